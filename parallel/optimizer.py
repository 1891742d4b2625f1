"""The optimizer and the unsharded way to step it.

`Updater` is what the engine knows of an optimizer: where gradients accumulate, when they are reduced, how a step is
taken, what a checkpoint keeps. `ZeroUpdater` (parallel/zero.py) is DeepSpeed's; `PlainUpdater` here is stage 0: a
torch optimizer and our own all-reduce, small enough to be read in one go. It also takes float64, so it is the oracle
of every proof.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.config import OptimizerConfig
from parallel.held import Tensors, held
from parallel.loss_scale import LossScale
from parallel.parameters import Fragment, LocalParameter
from parallel.topology import Topology


class Kind(StrEnum):
    """What an optimizer holds of each parameter, each of the parameter's shape; float32 wherever training is lower."""

    weight = "weight"
    """The master weight; the weight that the forward pass reads is this, rounded to the model's dtype."""
    first_moment = "exp_avg"
    second_moment = "exp_avg_sq"


MOMENTS = (Kind.first_moment.value, Kind.second_moment.value)
EXPERTS = "experts"
"""Name of the parameter groups of experts, which ZeRO shards over fewer ranks than the others."""


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

    def step(self, learning_rate: float) -> Tensor:
        """Clips, updates, clears the gradients; returns the global gradient norm [] before clipping.

        Gradients that overflowed under a dynamic `loss_scale` change nothing; then the norm is not finite.
        """
        ...

    def gradient(self, local: LocalParameter) -> Tensor:
        """The reduced gradient of a whole local parameter, after `accumulation`; every rank of its group calls this."""
        ...

    def fragments(self, local: LocalParameter, kind: Kind) -> Sequence[Fragment]:
        """What this rank's optimizer holds of a local parameter: live memory, which may be written to."""
        ...

    def sharers(self, local: LocalParameter) -> ProcessGroup | None:
        """The ranks that hold the fragments of a parameter together; None where each of them holds all of it."""
        ...

    def follow(self) -> None:
        """After masters were written to, makes the weights of the forward pass follow; all ranks call this."""
        ...

    def set_steps_taken(self, steps: int) -> None:
        """Tells the optimizer how many steps its moments stand for."""
        ...

    def held(self) -> Mapping[str, int]:
        """Bytes that this rank holds at this moment, by kind (`parallel.held`)."""
        ...

    def live(self) -> Tensors:
        """Every tensor that stays between two micro-batches or two steps, by kind."""
        ...


def adamw(
    parameters: Sequence[LocalParameter], tensors: Sequence[Tensor], config: OptimizerConfig
) -> torch.optim.AdamW:
    """torch's fused AdamW over `tensors`, one for each of `parameters`; weight decay on matrices only."""
    groups = []
    for expert, matrices in itertools.product((False, True), (True, False)):
        members = [
            tensor
            for local, tensor in zip(parameters, tensors, strict=True)
            if local.expert == expert and (len(local.shape) > 1) == matrices
        ]
        named = {"moe": True, "name": EXPERTS} if expert else {}
        groups.append({"params": members, "weight_decay": config.weight_decay if matrices else 0.0, **named})
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def create_state(optimizer: torch.optim.AdamW) -> None:
    """Makes AdamW's state at once, not at the first step, so that memory and checkpoints are the same throughout."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            optimizer.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                Kind.first_moment.value: torch.zeros_like(tensor),
                Kind.second_moment.value: torch.zeros_like(tensor),
            }


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Sets AdamW's count of steps, which its bias correction uses."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def reduce_tied(parameters: Sequence[LocalParameter], gradients: Sequence[Tensor], topology: Topology) -> None:
    """Adds up the gradients of a tied embedding's copies on the first and the last pipeline stage."""
    if topology.embedding_group is None:
        return
    for local, gradient in zip(parameters, gradients, strict=True):
        if local.tied:
            dist.all_reduce(gradient, group=topology.embedding_group)


def add_squares(total: Tensor, pairs: Iterable[tuple[LocalParameter, Tensor]], topology: Topology) -> None:
    """Adds to `total` [] float64 the squares of gradients, or of parts of them, each once in a whole model."""
    for local, gradient in pairs:
        if (local.cut_over_tensor_ranks or topology.tensor_rank == 0) and not local.tied_copy:
            total += torch.linalg.vector_norm(gradient).double().square().to(total.device)


class PlainUpdater:
    """Stage 0: every rank holds everything; gradients are summed by all-reduce, in fp32 (float64 in float64)."""

    def __init__(
        self,
        module: torch.nn.Module,
        parameters: Sequence[LocalParameter],
        *,
        config: OptimizerConfig,
        topology: Topology,
    ) -> None:
        self.module = module
        self.parameters = parameters
        self.topology = topology
        self.clip_norm = config.clip_norm
        self.masters = [
            local.parameter if local.parameter.dtype in (torch.float32, torch.float64) else
            local.parameter.detach().float() for local in parameters
        ]  # fmt: skip
        self.gradients = [torch.zeros_like(master, requires_grad=False) for master in self.masters]
        for local, gradient in zip(parameters, self.gradients, strict=True):
            local.parameter.register_post_accumulate_grad_hook(_add_into(gradient))
        self.optimizer = adamw(parameters, self.masters, config)
        create_state(self.optimizer)
        self.loss_scale = LossScale(dynamic=parameters[0].parameter.dtype == torch.float16)
        self._index = {local.parameter: number for number, local in enumerate(parameters)}

    @property
    def gradient_scale(self) -> float:
        return self.loss_scale.value

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        for gradient in self.gradients:
            gradient.zero_()
        yield
        reduce_tied(self.parameters, self.gradients, self.topology)
        groups = {False: self.topology.data_parallel_group, True: self.topology.expert_data_parallel_group}
        for local, gradient in zip(self.parameters, self.gradients, strict=True):
            dist.all_reduce(gradient, group=groups[local.expert])
            if self.loss_scale.dynamic:
                gradient.div_(self.loss_scale.value)

    def all_but_last_micro_batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The global gradient norm [], each parameter of the model counted once."""
        squares = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        groups = {False: self.topology.model_parallel_group, True: self.topology.expert_model_parallel_group}
        for expert, group in groups.items():
            pairs = zip(self.parameters, self.gradients, strict=True)
            own = torch.zeros_like(squares)
            add_squares(own, (pair for pair in pairs if pair[0].expert == expert), self.topology)
            dist.all_reduce(own, group=group)
            squares += own
        return squares.sqrt()

    @torch.no_grad()
    def step(self, learning_rate: float) -> Tensor:
        norm = self.norm()
        if self.loss_scale.dynamic:
            overflowed = not norm.isfinite()
            self.loss_scale.update(overflowed=overflowed)
            if overflowed:
                return norm
        if self.clip_norm > 0:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in self.gradients:
                gradient.mul_(factor)
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        for local, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None
            self._round(local, master)
        return norm

    @staticmethod
    def _round(local: LocalParameter, master: Tensor) -> None:
        if master is not local.parameter:
            local.parameter.data.copy_(master)

    def gradient(self, local: LocalParameter) -> Tensor:
        return self.gradients[self._index[local.parameter]]

    def fragments(self, local: LocalParameter, kind: Kind) -> list[Fragment]:
        master = self.masters[self._index[local.parameter]]
        value = master.detach() if kind is Kind.weight else self.optimizer.state[master][kind.value]
        return [Fragment(start=0, value=value.view(-1))]

    def sharers(self, local: LocalParameter) -> None:
        return None

    @torch.no_grad()
    def follow(self) -> None:
        for local, master in zip(self.parameters, self.masters, strict=True):
            self._round(local, master)

    def set_steps_taken(self, steps: int) -> None:
        set_steps(self.optimizer, steps)

    def held(self) -> dict[str, int]:
        return held(self.live(), self.topology.device)

    def live(self) -> Tensors:
        parameters = [local.parameter for local in self.parameters]
        return {
            "weights": [parameter.data for parameter in parameters],
            "masters": self.masters,
            "moments": [state[moment] for state in self.optimizer.state.values() for moment in MOMENTS],
            "gradients": [*self.gradients, *(parameter.grad for parameter in parameters)],
            "buffers": [],
        }


def _add_into(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that moves a fresh gradient into its float32 sum."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        total.add_(parameter.grad)
        parameter.grad = None

    return add
