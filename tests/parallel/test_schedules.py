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
