"""What the engine knows of an optimizer: where gradients accumulate, when they are reduced, how a step is taken, what a
checkpoint keeps.

Four things stand behind `Updater`. For optimizers that may be cut anywhere `PlainUpdater` (parallel/optimizer.py) steps
unsharded, `ShardedUpdater` (parallel/sharded.py) is ZeRO-1, `ZeroUpdater` (parallel/zero.py) DeepSpeed's ZeRO-2 and 3
and steps on the host; `WholeUpdater` (parallel/whole.py) steps each parameter whole on one rank, for all others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.held import Tensors
from parallel.loss_scale import LossScale
from parallel.parameters import Fragment, LocalParameter
from parallel.rules import FIRST_MOMENT, SECOND_MOMENT
from parallel.topology import Topology


class Kind(StrEnum):
    """What AdamW holds of each parameter, each of the parameter's shape; float32 wherever training is lower.

    Other optimizers keep other tensors under names of their own (`Updater.kinds`); all of them keep the weight.
    """

    weight = "weight"
    """The master weight; the weight that the forward pass reads is this, rounded to the model's dtype."""
    first_moment = FIRST_MOMENT
    second_moment = SECOND_MOMENT


MOMENTS = (Kind.first_moment.value, Kind.second_moment.value)
EXPERTS = "experts"
"""Name of the parameter groups of experts, which ZeRO shards over fewer ranks than the others."""


Refuses = Callable[[Tensor], Tensor]
"""Whether the update of a gradient with this norm [] must not be made: [] float32, 1 or 0, on the norm's device."""


def never(norm: Tensor) -> Tensor:
    """Refuses no update."""
    return torch.zeros((), dtype=torch.float32, device=norm.device)


class Updater(Protocol):
    """How gradients become a step."""

    module: Any
    """What forward passes go through."""
    loss_scale: LossScale

    @property
    def gradient_scale(self) -> float:
        """By what a loss must be multiplied so that `gradient` is that of its sum over data-parallel ranks."""
        ...

    def accumulation(self) -> AbstractContextManager[None]:
        """Encloses all forward and backward passes of a step; afterwards gradients are reduced."""
        ...

    def all_but_last_micro_batch(self) -> AbstractContextManager[None]:
        """Encloses the passes after which more follow in the same step."""
        ...

    def step(self, learning_rate: float, refuses: Refuses = never) -> tuple[Tensor, Tensor]:
        """Clips, updates, clears the gradients; returns the global gradient norm [] before clipping, and the refusal.

        Gradients that overflowed under a dynamic `loss_scale` change nothing; then the norm is not finite. Nor do those
        whose norm is refused, on all ranks alike; `refuses` is not asked where a smaller scale will help. AdamW takes
        the refusal on the device, so that nobody waits for it; who cannot (whole-parameter optimizers, ZeRO-3, steps
        on the host, fp16's scale) reads it.
        """
        ...

    def gradient(self, local: LocalParameter) -> Tensor:
        """The reduced gradient of a whole local parameter, after `accumulation`; every rank of its group calls this."""
        ...

    def kinds(self, local: LocalParameter) -> Sequence[str]:
        """Names of the tensors that are kept of a parameter beside its weight."""
        ...

    def pieces(self, local: LocalParameter, kind: str) -> Iterable[ShardedTensor]:
        """What this rank's optimizer holds of a parameter, as parts of the global tensor `kind.NAME`: live memory,
        which may be written to."""
        ...

    def observed(self, local: LocalParameter, kind: str) -> Sequence[tuple[ShardedTensor, Tensor]]:
        """What all ranks together hold of this rank's parameter, by the parameter's own global name; every rank that
        shares it calls this."""
        ...

    def follow(self) -> None:
        """After masters were written to, makes the weights of the forward pass follow; all ranks call this."""
        ...

    def set_steps_taken(self, steps: int) -> None:
        """Tells the optimizer how many steps its moments stand for."""
        ...

    def live(self) -> Tensors:
        """Every tensor that stays between two micro-batches or two steps, by kind."""
        ...


class Fragmented(Updater, Protocol):
    """An updater that holds each parameter, or its part of it, as runs of its flattened elements."""

    def fragments(self, local: LocalParameter, kind: str) -> Sequence[Fragment]:
        """What this rank's optimizer holds of a local parameter: live memory, which may be written to."""
        ...

    def sharers(self, local: LocalParameter) -> ProcessGroup | None:
        """The ranks that hold the fragments of a parameter together; None where each of them holds all of it."""
        ...


def reduce_tied(parameters: Sequence[LocalParameter], gradients: Sequence[Tensor], topology: Topology) -> None:
    """Adds up the gradients of a tied embedding's copies on the first and the last pipeline stage."""
    if topology.embedding_group is None:
        return
    for local, gradient in zip(parameters, gradients, strict=True):
        if local.tied:
            dist.all_reduce(gradient, group=topology.embedding_group)


def add_squares(total: Tensor, pairs: Iterable[tuple[LocalParameter, Tensor]], topology: Topology) -> None:
    """Adds to `total` [] float64 the squares of gradients, or of parts of them, each once in a whole model."""
    counted = [
        gradient
        for local, gradient in pairs
        if (local.cut_over_tensor_ranks or topology.tensor_rank == 0) and not local.tied_copy
    ]
    if counted:
        total += torch.stack(torch._foreach_norm(counted)).double().square().sum().to(total.device)


def add_into(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a fresh gradient into its float32 sum."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Those of what a module gives, which may have tuples in tuples."""
    if isinstance(output, Tensor):
        yield output
    else:
        for part in output:
            yield from tensors_of(part)
