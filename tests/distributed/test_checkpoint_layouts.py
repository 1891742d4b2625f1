"""The engine's checkpoints: any layout loads what any other saved, and a resumed run is the same run.

What a checkpoint must keep is compared in the global view, bit for bit: every weight (fp32 masters), both moments, and
the steps taken. On the same layout the next step's loss and norm after loading are those of the run that went on.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.verify.compare import whole
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.retention import Retention
from parallel.engine import Engine
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-rank-zero0": (1, {"zero_stage": 0}),
    "dp2-zero1": (2, {"zero_stage": 1}),
    "dp2-zero2": (2, {"zero_stage": 2}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "tp2-sp-zero1": (2, {"tensor": 2}),
    "pp2-vpp2-zero1": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2-sp-pp2-zero1": (4, {"tensor": 2, "pipeline": 2}),
    "pp2-dp2-zero1": (4, {"pipeline": 2}),
}
NAMES = list(LAYOUTS)
LIMIT_SECONDS = 180
"""A world takes one second; on a machine with eight times as much to do as it can, a minute was not enough."""
CASES = [(name, torch.float32) for name in NAMES]
CASES += [(name, torch.bfloat16) for name in ("dp2-zero1", "dp2-zero3", "tp2-sp-zero1", "pp2-vpp2-zero1")]


def _case(name: str, dtype: torch.dtype) -> Case:
    ranks, layout = LAYOUTS[name]
    return tiny(ranks, dtype=dtype, tied=True, **layout)


def _checkpoints(root: Path) -> Checkpoints:
    fence = Fence(attempt="test", holder=lambda: "test")
    return Checkpoints(root, retention=Retention(newest=3), fence=fence, layout={}, config={})


def _view(engine: Engine) -> dict[str, Any]:
    """This rank's shards of all that a checkpoint keeps, and the steps taken."""
    participants = engine.participants()
    return {
        "tensors": [
            (tensor, tensor.data.double().numpy().copy())
            for name in ("model", "optimizer")
            for tensor in participants[name].state_dict().values()
        ],
        "schedule": participants["schedule"].state_dict(),
    }


def _next_step(case: Case, engine: Engine) -> tuple[str, str]:
    result = engine.step(batch_of(case, 2, engine.topology))
    return float(result.loss).hex(), float(result.grad_norm).hex()


def _train_and_save(root: Path, case: Case) -> tuple[dict[str, Any], tuple[str, str]]:
    engine = engine_of(case)
    for step in range(2):
        engine.step(batch_of(case, step, engine.topology))
    _checkpoints(root).save(2, engine.participants())
    return _view(engine), _next_step(case, engine)


def _load(root: Path, case: Case) -> tuple[dict[str, Any], tuple[str, str]]:
    engine = engine_of(case)
    checkpoints = _checkpoints(root)
    assert checkpoints.resume(engine.participants(), fallback=False)
    return _view(engine), _next_step(case, engine)


def _global(answers: list[Any]) -> tuple[dict[str, np.ndarray], Any]:
    found = whole([view["tensors"] for view, _ in answers])
    assert not found.copies, f"copies differ: {list(found.copies)}"
    return found.tensors, answers[0][0]["schedule"]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_what_a_layout_saved_the_same_one_and_another_load(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    case = _case(name, dtype)
    went_on = run_world(partial(_train_and_save, tmp_path, case), case.ranks, seconds=LIMIT_SECONDS)
    tensors, schedule = _global(went_on)
    # Three further on: with eight layouts this leads from each to each in turn.
    for other in (name, NAMES[(NAMES.index(name) + 3) % len(NAMES)]):
        other_case = _case(other, dtype)
        resumed = run_world(partial(_load, tmp_path, other_case), other_case.ranks, seconds=LIMIT_SECONDS)
        loaded, loaded_schedule = _global(resumed)
        assert loaded.keys() == tensors.keys()
        different = [key for key, tensor in tensors.items() if not np.array_equal(tensor, loaded[key])]
        assert not different, f"{name} -> {other}: {different}"
        assert loaded_schedule == schedule
        if other == name:
            assert [step for _, step in resumed] == [step for _, step in went_on]
