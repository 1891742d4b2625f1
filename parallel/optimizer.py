"""AdamW, and the unsharded way to step it.

`PlainUpdater` is stage 0: a torch optimizer and our own all-reduce, small enough to be read in one go. It also takes
float64, so it is the oracle of every proof.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from parallel.config import OptimizerConfig
from parallel.fragments import observed_fragments, pieces_of_fragments
from parallel.held import Tensors
from parallel.loss_scale import LossScale
from parallel.parameters import Fragment, LocalParameter, setting_of
from parallel.rules import Setting
from parallel.topology import Topology, add_up
from parallel.updater import EXPERTS, MOMENTS, Kind, Refuses, add_into, add_squares, never, reduce_tied


def adamw(
    parameters: Sequence[LocalParameter], tensors: Sequence[Tensor], config: OptimizerConfig
) -> torch.optim.AdamW:
    """torch's fused AdamW over `tensors`, one for each of `parameters`, in groups of equal settings."""
    groups = []
    for expert, matrices in itertools.product((False, True), (True, False)):
        by_setting: dict[Setting, list[Tensor]] = {}
        for local, tensor in zip(parameters, tensors, strict=True):
            if local.expert == expert and local.is_matrix == matrices:
                by_setting.setdefault(setting_of(local, config), []).append(tensor)
        named = {"moe": True, "name": EXPERTS} if expert else {}
        for found, members in by_setting.items():
            groups.append({"params": members, **asdict(found), **named})
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every group the scheduled rate times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("learning_rate_factor", 1.0)


def create_state(optimizer: torch.optim.AdamW) -> None:
    """Makes AdamW's state at once, not at the first step, so that memory and checkpoints are the same throughout."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            optimizer.state[tensor] = {
                "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
                Kind.first_moment.value: torch.zeros_like(tensor),
                Kind.second_moment.value: torch.zeros_like(tensor),
            }


def set_refused(optimizer: torch.optim.Optimizer, refused: Tensor) -> None:
    """Has the fused AdamW leave weights, moments and its count of steps as they are where `refused` [] is 1.

    It is what torch's gradient scaler does; the kernel reads the number, so that the host need not.
    """
    optimizer.found_inf = refused  # type: ignore[attr-defined]


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Sets AdamW's count of steps, which its bias correction uses."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


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
        for local, master, gradient in zip(parameters, self.masters, self.gradients, strict=True):
            master.grad = gradient  # where it is the parameter itself, autograd adds to it in place
            if master is not local.parameter:
                local.parameter.register_post_accumulate_grad_hook(add_into(gradient))
        self.optimizer = adamw(parameters, self.masters, config)
        create_state(self.optimizer)
        self.loss_scale = LossScale(dynamic=parameters[0].parameter.dtype == torch.float16)
        self._index = {local.parameter: number for number, local in enumerate(parameters)}

    @property
    def gradient_scale(self) -> float:
        return self.loss_scale.value

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        torch._foreach_zero_(self.gradients)
        yield
        reduce_tied(self.parameters, self.gradients, self.topology)
        groups = {False: self.topology.data_parallel_group, True: self.topology.expert_data_parallel_group}
        for local, gradient in zip(self.parameters, self.gradients, strict=True):
            add_up(gradient, groups[local.expert])
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
            add_up(own, group)
            squares += own
        return squares.sqrt()

    @torch.no_grad()
    def step(self, learning_rate: float, refuses: Refuses = never) -> tuple[Tensor, Tensor]:
        norm = self.norm()
        refused = self.loss_scale.refusal(norm, refuses)
        if self.clip_norm > 0:
            factor = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(self.gradients, factor.to(self.gradients[0].dtype))
        set_learning_rate(self.optimizer, learning_rate)
        set_refused(self.optimizer, refused)
        self.optimizer.step()
        self.follow()
        return norm, refused

    def gradient(self, local: LocalParameter) -> Tensor:
        return self.gradients[self._index[local.parameter]]

    def kinds(self, local: LocalParameter) -> tuple[str, ...]:
        return MOMENTS

    def fragments(self, local: LocalParameter, kind: str) -> list[Fragment]:
        master = self.masters[self._index[local.parameter]]
        value = master.detach() if kind == Kind.weight else self.optimizer.state[master][kind]
        return [Fragment(start=0, value=value.view(-1))]

    def pieces(self, local: LocalParameter, kind: str) -> Iterable[ShardedTensor]:
        return pieces_of_fragments(self, local, kind)

    def observed(self, local: LocalParameter, kind: str) -> list[tuple[ShardedTensor, Tensor]]:
        return observed_fragments(self, local, kind)

    def sharers(self, local: LocalParameter) -> None:
        return None

    @torch.no_grad()
    def follow(self) -> None:
        for local, master in zip(self.parameters, self.masters, strict=True):
            if master is not local.parameter:
                local.parameter.data.copy_(master)

    def set_steps_taken(self, steps: int) -> None:
        set_steps(self.optimizer, steps)

    def live(self) -> Tensors:
        parameters = list(self.module.parameters())
        return {
            "weights": [parameter.data for parameter in parameters],
            "masters": self.masters,
            "moments": [state[moment] for state in self.optimizer.state.values() for moment in MOMENTS],
            "gradients": [*self.gradients, *(parameter.grad for parameter in parameters)],
            "buffers": [],
        }
