"""A golden checkpoint of format version 1: whatever is changed, these files load for ever.

A tiny model after three steps on two ranks (tensor parallel, sequence parallel), with weights, both moments, schedule,
and a participant with JSON state. `known.json` has what must come out of it: of each tensor the shape, sum and sum of
squares in float64, and the JSON states. `python -m tests.golden.test_checkpoint` made both; a new format version gets a
directory of its own beside this one, which is never written again.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.verify.compare import whole
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.integrity import problems
from parallel.checkpoint.load import load
from parallel.checkpoint.manifest import FORMAT, STATE, Manifest
from parallel.checkpoint.retention import Retention
from parallel.checkpoint.stream import StoredTensors
from parallel.common.stateful import Dispensable
from tests.distributed.layouts import tiny

GOLDEN = Path(__file__).with_name("checkpoint-v1")
STEP = GOLDEN / "step-00000003"
KNOWN = GOLDEN / "known.json"

pytestmark = [pytest.mark.distributed, pytest.mark.truth]


class Later(Dispensable):
    """A participant that was not there when the checkpoint was written."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError(f"the checkpoint has no state of it, and it was given {state}")


class Place:
    """A participant with JSON state."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        assert self.state is not None
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


PLACE = {"position": 4096, "loss": 0.1, "ledger": {"código": 12}}


def case(**layout: Any) -> Case:
    """The model of the checkpoint, in any layout."""
    ranks = layout.get("tensor", 1) * layout.get("pipeline", 1)
    return tiny(ranks, tied=True, **layout)


def numbers(tensor: torch.Tensor) -> dict[str, Any]:
    """What identifies a tensor, whatever order its sums are taken in."""
    exact = tensor.double()
    return {"shape": list(tensor.shape), "sum": float(exact.sum()), "squares": float(exact.square().sum())}


def found(stored: StoredTensors) -> dict[str, Any]:
    """What `known.json` says of the tensors."""
    return {name: numbers(stored.read(name)) for name in sorted(stored.shapes)}


def assert_known(tensors: dict[str, dict[str, Any]]) -> None:
    """They are the recorded ones."""
    known = json.loads(KNOWN.read_text())["tensors"]
    assert tensors.keys() == known.keys()
    for name, facts in tensors.items():
        assert facts["shape"] == known[name]["shape"], name
        for key in ("sum", "squares"):
            assert facts[key] == pytest.approx(known[name][key], rel=1e-12, abs=1e-12), name


def test_it_is_whole_and_has_what_is_known() -> None:
    manifest = Manifest.read(STEP)
    assert manifest.step == 3
    assert json.loads((STEP / "manifest.json").read_text())["format"] == 1
    assert list(problems(STEP, manifest)) == []
    assert_known(found(StoredTensors(STEP)))
    assert json.loads((STEP / STATE).read_text()) == json.loads(KNOWN.read_text())["state"]


def _loaded(wanted: Case) -> tuple[list[tuple[Any, Any]], dict[str, Any], Any]:
    engine, place = engine_of(wanted), Place()
    load(STEP, {**engine.participants(), "place": place, "later": Later()})
    participants = engine.participants()
    pieces = [
        (piece, piece.data.numpy().copy())
        for name in ("model", "optimizer")
        for piece in participants[name].state_dict().values()
    ]
    return pieces, participants["schedule"].state_dict(), place.state


@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}, {"tensor": 2}], ids=["one-rank", "pipeline", "tensor"])
def test_every_layout_loads_it(layout: dict[str, int]) -> None:
    wanted = case(**layout)
    answers = run_world(_loaded, wanted.ranks, wanted)
    tensors = whole([pieces for pieces, _, _ in answers]).tensors
    assert_known({name: numbers(torch.from_numpy(tensor)) for name, tensor in tensors.items()})
    state = json.loads(KNOWN.read_text())["state"]
    for _, schedule, place in answers:
        assert schedule == state["schedule"]
        assert place == state["place"] == PLACE


def _save() -> None:
    wanted = case(tensor=2)
    engine = engine_of(wanted)
    for step in range(3):
        engine.step(batch_of(wanted, step, engine.topology))
    fence = Fence(attempt="golden", holder=lambda: "golden")
    checkpoints = Checkpoints(GOLDEN, retention=Retention(newest=1), fence=fence, layout={"tensor": 2}, config={})
    checkpoints.save(3, {**engine.participants(), "place": Place(PLACE)}, metrics={"loss": 1.5})


if __name__ == "__main__":
    if FORMAT != 1 or STEP.exists():
        sys.exit(f"{GOLDEN} is there and stays; format {FORMAT} gets a directory of its own")
    shutil.rmtree(GOLDEN, ignore_errors=True)
    run_world(_save, 2)
    content = {"state": json.loads((STEP / STATE).read_text()), "tensors": found(StoredTensors(STEP))}
    KNOWN.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
