"""The collectives of one step of a tiny copy, as they happen: which, over which ranks, when, how often, how many bytes.

torch's dispatcher sees every one of them, whoever calls it: megatron-core in a layer, its pipeline schedule, DeepSpeed
in a hook of the backward pass, or we. So what is shown was counted, not derived.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from launcher.explain.measured import at_last_forward_pass
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from model import attention
from parallel.engine import Engine
from parallel.topology import Topology

_SCALARS_BYTES = 64
"""Messages up to this size are sums of single numbers: losses, weights, norms."""
_NAMES = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "alltoall_": "all-to-all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}


class When(StrEnum):
    """Parts of a step."""

    before = "before the last forward pass"
    last = "from the last forward pass on"
    reduction = "after the last backward pass"
    update = "in the update"


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """Calls of one kind in one part of a step, on one rank."""

    when: When
    name: str
    over: str
    """The dimension whose ranks take part."""
    ranks: int
    calls: int
    bytes: int
    """Of all calls together, of the larger side where the two differ."""


def collectives(case: Case) -> list[Collective]:
    """Those of rank 0 in one step, in the order of the step; single numbers are left out."""
    return run_world(lambda: _collectives(case), case.ranks)[0]


def _collectives(case: Case) -> list[Collective]:
    engine = engine_of(case)
    recorder = _Recorder(engine.topology)
    # A tensor subclass cannot be made while the dispatcher is watched.
    attention.causal_lower_right = _unwatched(attention.causal_lower_right)  # type: ignore[assignment]
    with recorder, _phases(engine, case, recorder):
        engine.accumulate(batch_of(case, 0, engine.topology))
        recorder.when = When.update
        engine.updater.step(1e-3)
    return recorder.found()


def _unwatched(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*arguments: Any) -> Any:
        with _disable_current_modes():
            return make(*arguments)

    return made


@contextmanager
def _phases(engine: Engine, case: Case, recorder: "_Recorder") -> Iterator[None]:
    """Tells the recorder where in a step the engine is."""
    accumulation = engine.updater.accumulation

    @contextmanager
    def told() -> Iterator[None]:
        with accumulation():
            yield
            recorder.when = When.reduction

    def last() -> None:
        recorder.when = When.last

    engine.updater.accumulation = told  # type: ignore[method-assign]
    at_last_forward_pass(engine, case, last)
    yield


class _Recorder(TorchDispatchMode):
    """Counts the collectives that are called while it is active."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.when = When.before
        self._over = _dimensions(topology)
        self._calls: Counter[tuple[When, str, str, int]] = Counter()
        self._bytes: Counter[tuple[When, str, str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple[Any, ...]) -> None:
        group = next((group for group in map(_group, args) if group is not None), None)
        size = max(map(_bytes, args), default=0)
        if group is None or group.size() == 1 or size <= _SCALARS_BYTES:
            return
        name = _NAMES.get(name, name.strip("_"))
        everybody = "all ranks" if group.size() == dist.get_world_size() else "other"
        over = "pipeline" if name in ("send", "receive") else self._over.get(group.group_name, everybody)
        key = (self.when, name, over, 2 if name in ("send", "receive") else group.size())
        self._calls[key] += 1
        self._bytes[key] += size

    def found(self) -> list[Collective]:
        order = list(When)
        keys = sorted(self._calls, key=lambda key: (order.index(key[0]), key[2], key[1]))
        return [
            Collective(
                when=key[0], name=key[1], over=key[2], ranks=key[3], calls=self._calls[key], bytes=self._bytes[key]
            )
            for key in keys
        ]


def _dimensions(topology: Topology) -> dict[str, str]:
    """What the ranks of each group share, by the group's name."""
    groups = topology.groups
    named = {
        "tensor x context": getattr(groups, "tp_cp", None),
        "tensor x expert": getattr(groups, "tp_ep", None),
        "embedding": topology.embedding_group,
        "context": groups.cp,
        "pipeline": groups.pp,
        "tensor": groups.tp,
        "expert": groups.ep,
        "experts' tensor": groups.expt_tp,
        "experts' data": topology.expert_data_parallel_group,
        "model": topology.model_parallel_group,
        "data x context" if topology.config.context > 1 else "data": topology.data_parallel_group,
    }
    return {group.group_name: dimension for dimension, group in named.items() if group is not None}


def _group(argument: Any) -> dist.ProcessGroup | None:
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument)
    except RuntimeError:  # a ScriptObject of another kind: the operation to reduce by
        return None


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(_bytes, argument)) if isinstance(argument, list | tuple) else 0
