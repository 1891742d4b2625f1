"""What the checkpoint tests share: participants with hand-made sharded tensors in any layout, and one saved run."""

import os
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from launcher.verify.world import run_world
from parallel.checkpoint.agreement import agreed
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence, claim
from parallel.checkpoint.manifest import whole_steps
from parallel.checkpoint.retention import Retention

ROWS, COLUMNS, LAYERS = 8, 6, 4


class Counter:
    """A participant with JSON state."""

    def __init__(self, value: float = 0.1) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.value, "ledger": {"code": 3}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["ledger"] == {"code": 3}
        self.value = state["position"]


class Weights:
    """A participant with tensors in one of three layouts; `fill` gives each its global content, known everywhere.

    `tensor`: a matrix cut by columns, `rows`: by rows, `ragged`: into flat-ish pieces of unequal size as ZeRO's
    fragments are, some ranks with an empty one. A vector is replicated; layers are dealt out to the ranks.
    """

    def __init__(self, layout: str, prefix: str = "weights", seed: int | None = None) -> None:
        self.layout, self.prefix = layout, prefix
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.matrix_place = self._place()
        matrix = global_tensor("matrix", seed)
        (row, column), (rows, columns) = self.matrix_place
        self.local = {
            "matrix": matrix[row : row + rows, column : column + columns].clone(),
            "vector": global_tensor("vector", seed),
            "scalar": global_tensor("scalar", seed),
        }
        for layer in self._layers():
            self.local[f"layer.{layer}"] = global_tensor(f"layer.{layer}", seed)

    def _place(self) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.layout == "tensor":
            width = COLUMNS // self.size
            return (0, width * self.rank), (ROWS, width)
        if self.layout == "rows":
            height = ROWS // self.size
            return (height * self.rank, 0), (height, COLUMNS)
        first = ROWS if self.size == 1 else ROWS - 3
        heights = [first, *([ROWS - first] if self.size > 1 else []), *([0] * max(0, self.size - 2))]
        return (min(sum(heights[: self.rank]), ROWS - 1), 0), (heights[self.rank], COLUMNS)

    def _layers(self) -> list[int]:
        return [layer for layer in range(LAYERS) if layer * self.size // LAYERS == self.rank]

    def state_dict(self) -> dict[str, ShardedTensor]:
        return {name: self._sharded(name, data) for name, data in self.local.items()}

    def _sharded(self, name: str, data: torch.Tensor) -> ShardedTensor:
        key = f"{self.prefix}.{name}"
        if name == "matrix":
            offset, shape = self.matrix_place
            return ShardedTensor(key, data, data.dtype, shape, (ROWS, COLUMNS), offset, None)
        replica = 0 if name.startswith("layer") else self.rank
        return ShardedTensor.from_rank_offsets(key, data, replica_id=replica)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert state.keys() == self.local.keys()
        for name, data in state.items():
            assert not isinstance(data, ShardedTensor)
            self.local[name] = data.clone()


def global_tensor(name: str, seed: int | None) -> torch.Tensor:
    """The whole tensor; without a seed it is zero, as in a fresh model that is about to load."""
    shape = {"matrix": (ROWS, COLUMNS), "vector": (5,), "scalar": ()}.get(name, (3, 2))
    if seed is None:
        return torch.zeros(shape)
    # Names differ in their bytes' sum, so that no two tensors are alike.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1000 + sum(name.encode())))


def checkpoints(root: Path, *, keep: int = 10, attempt: str = "first", asynchronous: bool = False) -> Checkpoints:
    """Every rank calls this where a save in the background is wanted: it makes a process group for it."""
    return Checkpoints(
        root,
        retention=Retention(newest=keep),
        fence=Fence(attempt=attempt, holder=lambda: attempt),
        layout={"ranks": 2},
        config={"seed": 1},
        group=cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if asynchronous else None,
        asynchronous=asynchronous,
    )


def newest_step(root: Path) -> Path | None:
    """The step directory with the highest step whose manifest is whole."""
    return max(whole_steps(root).items(), default=(0, None))[1]


def save(
    root: Path,
    layout: str = "tensor",
    steps: tuple[int, ...] = (1,),
    keep: int = 10,
    attempt: str = "a",
    asynchronous: bool = False,
) -> None:
    """One rank's work: begins an attempt, then saves each step with contents that follow from the step."""
    with agreed("begin"):
        if dist.get_rank() == 0:
            claim(root, attempt)
    writer = checkpoints(root, keep=keep, attempt=attempt, asynchronous=asynchronous)
    for step in steps:
        participants = {
            "weights": Weights(layout, seed=step),
            "moments": Weights(layout, "moments", seed=-step),
            "progress": Counter(step / 10),
        }
        writer.save(step, participants)
    writer.wait()


def load(root: Path, layout: str = "tensor", path: Path | None = None) -> int:
    """One rank's work: loads `path`, by default the newest, asserts every bit, and returns its step."""
    found = path or newest_step(root)
    assert found
    step = int(found.name.removeprefix("step-"))
    weights, moments, progress = Weights(layout), Weights(layout, "moments"), Counter()
    checkpoints(root).load(found, {"weights": weights, "moments": moments, "progress": progress})
    for read, wanted in (
        (weights, Weights(layout, seed=step)),
        (moments, Weights(layout, "moments", seed=-step)),
    ):
        for name, tensor in wanted.local.items():
            assert torch.equal(read.local[name], tensor), name
    assert progress.value == step / 10
    return step


def with_fault(fault: str, rank: int, function: Any, *args: Any) -> Any:
    """One rank's work: calls the function with a fault point armed on one rank only."""
    if dist.get_rank() == rank:
        os.environ["BLOOMERY_FAULT"] = fault
    return function(*args)


def saved(root: Path, world_size: int = 1, **options: Any) -> Path:
    """Saves in a world of its own and returns the newest step's directory."""
    run_world(lambda: save(root, **options), world_size)
    found = newest_step(root)
    assert found
    return found
