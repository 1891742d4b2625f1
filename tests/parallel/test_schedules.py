"""Learning rates against numbers computed by hand and against torch's own schedule."""

import pytest
import torch

from parallel.config import OptimizerConfig, ScheduleConfig, ScheduleName
from parallel.schedules import Schedule


def rates(total: int, **shape: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleConfig(**shape))  # type: ignore[arg-type]
    schedule = Schedule(config, total)
    return [schedule.learning_rate(step) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert rates(8, name=ScheduleName.constant, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_linear_reaches_the_minimum_on_the_last_step() -> None:
    assert rates(5, name=ScheduleName.linear, min_learning_rate=0.2) == pytest.approx([0.84, 0.68, 0.52, 0.36, 0.2])


def test_cosine_is_torchs() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1)
    expected = []
    for _ in range(20):
        optimizer.step()
        reference.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(20, name=ScheduleName.cosine, min_learning_rate=0.1) == pytest.approx(expected)


def test_wsd_is_flat_and_then_falls_in_a_tenth() -> None:
    found = rates(20, name=ScheduleName.wsd, warmup_steps=2)
    assert found[1:18] == [1.0] * 17
    assert found[18:] == [0.5, 0.0]
    assert rates(20, name=ScheduleName.wsd, decay_steps=4)[15:] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])


def test_inverse_square_root_falls_with_the_step_and_knows_no_end() -> None:
    found = rates(64, name=ScheduleName.inverse_sqrt, warmup_steps=4, min_learning_rate=0.26)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert [found[step - 1] for step in (9, 16, 36)] == pytest.approx([2 / 3, 0.5, 1 / 3])
    assert found[-1] == 0.26
    assert rates(16, name=ScheduleName.inverse_sqrt)[3::12] == [0.5, 0.25]
    assert rates(40, name=ScheduleName.inverse_sqrt, warmup_steps=4)[:16] == pytest.approx(
        rates(16, name=ScheduleName.inverse_sqrt, warmup_steps=4)
    )


def test_a_table_of_all_shapes() -> None:
    """Ten steps, peak 1, two of warm-up, down to 0.2; computed by hand."""
    shape = {"warmup_steps": 2, "min_learning_rate": 0.2}
    table = {
        ScheduleName.constant: [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        ScheduleName.linear: [0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
        ScheduleName.cosine: [0.5, 1, 0.969552, 0.882843, 0.753073, 0.6, 0.446927, 0.317157, 0.230448, 0.2],
        ScheduleName.wsd: [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2],
        ScheduleName.inverse_sqrt: [
            0.5, 1, 0.816497, 0.707107, 0.632456, 0.577350, 0.534522, 0.5, 0.471405, 0.447214,
        ],
    }  # fmt: skip
    assert set(table) == set(ScheduleName)
    for name, expected in table.items():
        decay = {"decay_steps": 4} if name is ScheduleName.wsd else {}
        assert rates(10, name=name, **shape, **decay) == pytest.approx(expected, abs=1e-6)
