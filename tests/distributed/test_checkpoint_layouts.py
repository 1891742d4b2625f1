"""The engine's checkpoints: every layout loads what every other saved, and a resumed run is the same run.

What a checkpoint must keep is compared in the global view, bit for bit: every weight (fp32 masters), both moments, and
the steps taken. On the same layout the next step's loss and norm after loading are those of the run that went on. Each
layout saves once, in one world, and loads what all have saved, in another. `make soak` takes every pair of all layouts;
`make test` every pair of those that differ most.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.verify.compare import whole
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from model.config import LoraConfig, MoeConfig
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.load import load
from parallel.checkpoint.retention import Retention
from parallel.engine import Engine
from tests.distributed.layouts import tiny

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.truth,
    pytest.mark.slow,
]

DENSE: dict[str, tuple[int, dict[str, Any]]] = {
    "one-rank-zero0": (1, {"zero_stage": 0}),
    "dp2-zero1": (2, {"zero_stage": 1}),
    "dp2-zero2-offload": (2, {"zero_stage": 2, "offload": True}),
    "dp3-zero3": (3, {"zero_stage": 3}),
    "tp2-sp": (2, {"tensor": 2}),
    "pp2-vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2-sp-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "cp2-dp2-zero2": (4, {"context": 2, "zero_stage": 2}),
}
ROUNDED = {name: DENSE[name] for name in ("dp2-zero1", "dp3-zero3", "tp2-sp", "pp2-vpp2")}
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one-rank-zero0": (1, {"zero_stage": 0}),
    "ep2": (2, {"expert": 2}),
    "dp2-zero2": (2, {"zero_stage": 2}),
    "tp2-sp-ep2": (4, {"tensor": 2, "expert": 2}),
}
WHOLE = {name: DENSE[name] for name in ("one-rank-zero0", "dp2-zero1", "pp2-vpp2", "tp2-sp-pp2")}
"""Layouts of optimizers that step whole parameters, whose owners are other ranks in each."""
ADAPTED = {name: DENSE[name] for name in ("one-rank-zero0", "dp3-zero3", "tp2-sp-pp2")}
LIMIT_SECONDS = 180
"""A world takes one second; on a machine with eight times as much to do as it can, a minute was not enough."""

Step = tuple[str, str]
"""Loss and gradient norm in hexadecimal: every bit."""
View = dict[str, Any]
Global = tuple[dict[str, np.ndarray], dict[str, Any]]


def _dense(name: str) -> Case:
    ranks, layout = DENSE[name]
    return _of_twelve(tiny(ranks, tied=True, **layout))


def _rounded(name: str) -> Case:
    return replace(_dense(name), dtype=torch.bfloat16)


def _experts(name: str) -> Case:
    ranks, layout = EXPERTS[name]
    case = _of_twelve(tiny(ranks, layers=2, **layout))
    moe = MoeConfig(experts=4, ffn_hidden_size=32, shared_ffn_hidden_size=16)
    return replace(case, config=replace(case.config, model=replace(case.config.model, moe=moe)))


def _adapted(name: str) -> Case:
    """Adapters, and matrices that stay as they are."""
    case = _dense(name)
    lora = LoraConfig(rank=3, alpha=6, initial_std=0.1)
    return replace(case, config=replace(case.config, model=replace(case.config.model, layers=2, lora=lora)))


def _stepped_by(optimizer: str) -> Callable[[str], Case]:
    def make(name: str) -> Case:
        case = _dense(name)
        return replace(
            case,
            config=replace(
                case.config,
                optimizer=replace(case.config.optimizer, name=optimizer, frozen=["layers.1"], average_decay=0.9),
            ),
        )

    return make


_muon, _adafactor = _stepped_by("muon"), _stepped_by("adafactor")


def _eight_bit(name: str) -> Case:
    """With matrices that are large enough for bytes."""
    case = _stepped_by("adamw_8bit")(name)
    return replace(case, config=replace(case.config, model=replace(case.config.model, hidden_size=64)))


def _of_twelve(case: Case) -> Case:
    """A global batch that one, two, three and four ranks divide."""
    return replace(case, config=replace(case.config, train=replace(case.config.train, global_batch_size=12)))


def _view(engine: Engine) -> View:
    """This rank's pieces of all that a checkpoint keeps, and the steps taken."""
    participants = engine.participants()
    return {
        "tensors": [
            (tensor, tensor.data.numpy().copy())
            for name in ("model", "optimizer", "average")
            if name in participants
            for tensor in participants[name].state_dict().values()
        ],
        "schedule": participants["schedule"].state_dict(),
    }


def _next_step(case: Case, engine: Engine) -> Step:
    result = engine.step(batch_of(case, 2, engine.topology))
    return float(result.loss).hex(), float(result.grad_norm).hex()


def _train_and_save(root: Path, case: Case) -> tuple[View, Step]:
    engine = engine_of(case)
    for step in range(2):
        engine.step(batch_of(case, step, engine.topology))
    fence = Fence(attempt="test", holder=lambda: "test")
    checkpoints = Checkpoints(root, retention=Retention(newest=3), fence=fence, layout={}, config={})
    checkpoints.save(2, engine.participants())
    return _view(engine), _next_step(case, engine)


def _load_all(roots: list[Path], case: Case) -> tuple[list[View], Step]:
    """What this layout makes of each checkpoint, and its next step after the last."""
    engine = engine_of(case)
    views = []
    for root in roots:
        load(root / "step-00000002", engine.participants())
        views.append(_view(engine))
    return views, _next_step(case, engine)


def _global(views: list[View]) -> Global:
    found = whole([view["tensors"] for view in views])
    assert not found.copies, f"copies differ: {list(found.copies)}"
    assert all(view["schedule"] == views[0]["schedule"] for view in views)
    return found.tensors, views[0]["schedule"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Global, list[Step]]]:
    """Saves what a layout has after two steps, once; returns where, what it was, and each rank's third step."""

    @cache
    def save(make: Callable[[str], Case], name: str) -> tuple[Path, Global, list[Step]]:
        root = tmp_path_factory.mktemp(name)
        case = make(name)
        answers = run_world(_train_and_save, case.ranks, root, case, seconds=LIMIT_SECONDS)
        return root, _global([view for view, _ in answers]), [step for _, step in answers]

    return save


def _pairs(kind: str, make: Callable[[str], Case], names: Sequence[str], *marks: pytest.MarkDecorator) -> list[Any]:
    """Every layout as the one that loads, and those that have saved."""
    return [pytest.param(make, list(names), name, id=f"{kind}-{name}", marks=marks) for name in names]


@pytest.mark.parametrize(
    ("make", "names", "name"),
    [
        *_pairs("fp32", _dense, ("one-rank-zero0", "dp2-zero2-offload", "dp3-zero3", "pp2-vpp2", "tp2-sp-pp2")),
        *_pairs("bf16", _rounded, ("dp3-zero3", "pp2-vpp2")),
        *_pairs("moe", _experts, ("one-rank-zero0", "tp2-sp-ep2")),
        *_pairs("muon", _muon, ("dp2-zero1", "tp2-sp-pp2")),
        *_pairs("lora", _adapted, ("dp3-zero3", "tp2-sp-pp2")),
        *_pairs("adamw-8bit", _eight_bit, ("pp2-vpp2", "tp2-sp-pp2")),
        *_pairs("every-fp32", _dense, tuple(DENSE), pytest.mark.long),
        *_pairs("every-bf16", _rounded, tuple(ROUNDED), pytest.mark.long),
        *_pairs("every-moe", _experts, tuple(EXPERTS), pytest.mark.long),
        *_pairs("every-muon", _muon, tuple(WHOLE), pytest.mark.long),
        *_pairs("every-adafactor", _adafactor, tuple(WHOLE), pytest.mark.long),
        *_pairs("every-lora", _adapted, tuple(ADAPTED), pytest.mark.long),
    ],
)
def test_a_layout_loads_what_every_layout_saved(
    saved: Callable[..., tuple[Path, Global, list[Step]]], make: Callable[[str], Case], names: list[str], name: str
) -> None:
    order = [other for other in names if other != name] + [name]
    wanted = [saved(make, other) for other in order]
    case = make(name)
    answers = run_world(_load_all, case.ranks, [root for root, _, _ in wanted], case, seconds=LIMIT_SECONDS)
    for number, (other, (_, (tensors, schedule), _)) in enumerate(zip(order, wanted, strict=True)):
        loaded, loaded_schedule = _global([views[number] for views, _ in answers])
        assert loaded.keys() == tensors.keys()
        different = [key for key, tensor in tensors.items() if not np.array_equal(tensor, loaded[key])]
        assert not different, f"{other} -> {name}: {different}"
        assert loaded_schedule == schedule
    assert [step for _, step in answers] == wanted[-1][2], "on the same layout the run goes on with the same bits"


def test_the_saved_states_differ(saved: Callable[..., tuple[Path, Global, list[Step]]]) -> None:
    """So that a load that did nothing would be seen: the second layout's state is not left over from the first."""
    (_, (first, _), _), (_, (second, _), _) = saved(_dense, "one-rank-zero0"), saved(_dense, "tp2-sp-pp2")
    assert any(not np.array_equal(tensor, second[key]) for key, tensor in first.items())
    assert all(np.allclose(tensor, second[key], atol=1e-2) for key, tensor in first.items())
