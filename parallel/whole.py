"""Optimizers that look at whole matrices: each parameter is stepped by one rank, which has all of it.

    gradients [local, fp32]  --reduced to the owner's data-parallel rank-->  --tensor ranks' parts put together-->
    whole gradient on one rank  --any torch optimizer-->  whole master  --broadcast, cut, broadcast-->  weights

Idea: what an optimizer computes of a parameter is then what it computes on one rank, whatever it does with it, so that
Muon, Adafactor or anybody's own run in every layout without knowing of any. Owners are dealt out over the ranks that
hold the same layers (data x context x tensor), the largest parameters first, so that masters and state are shared out
as in ZeRO-1; at stage 0 every data-parallel rank owns all that its place in the tensor dimension owns.

Trade-off: one collective of each kind for each parameter, none overlapped with the backward pass; gradients stay whole
in fp32 on every rank. That is why stages 2 and 3, which cut gradients and weights anywhere, are refused.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.config import OptimizerConfig
from parallel.held import Tensors
from parallel.loss_scale import LossScale
from parallel.memory import owners
from parallel.optimizer import set_learning_rate
from parallel.parameters import LocalParameter, setting_of
from parallel.rules import RULES
from parallel.topology import Topology
from parallel.torch_optimizers import BUILDERS, Stepped
from parallel.updater import Kind, Refuses, add_into, add_squares, never, reduce_tied


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Who steps a parameter."""

    local: LocalParameter
    data_group: ProcessGroup
    tensor_group: ProcessGroup
    data_owner: int | None
    """Rank in the data group; None where each of them does (stage 0)."""
    tensor_owner: int

    @property
    def on_data_owner(self) -> bool:
        """Whether this rank is the owner or one of its tensor ranks."""
        return self.data_owner is None or self.data_group.rank() == self.data_owner

    @property
    def mine(self) -> bool:
        """Whether this rank is the owner."""
        return self.on_data_owner and self.tensor_group.rank() == self.tensor_owner

    @property
    def cut(self) -> bool:
        """Whether tensor ranks hold parts."""
        return self.local.whole_shape != tuple(self.local.shape)


class WholeUpdater:
    """Gradients to a step, parameter by parameter."""

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
        self.config = config
        self._wide = torch.float64 if parameters[0].parameter.dtype is torch.float64 else torch.float32
        self.gradients = [
            torch.zeros_like(local.parameter, dtype=self._wide, requires_grad=False) for local in parameters
        ]
        for local, gradient in zip(parameters, self.gradients, strict=True):
            local.parameter.register_post_accumulate_grad_hook(add_into(gradient))
        self.places = _places(parameters, topology)
        self.loss_scale = LossScale(dynamic=parameters[0].parameter.dtype == torch.float16)
        self._index = {local.parameter: number for number, local in enumerate(parameters)}
        self.masters = self._first_masters()
        stepped = [
            Stepped(
                name=parameters[number].name,
                master=master,
                setting=setting_of(parameters[number], config),
            )
            for number, master in self.masters.items()
        ]
        self.optimizers = list(BUILDERS[config.name](stepped, config)) if stepped else []
        self._create_state()

    @torch.no_grad()
    def _first_masters(self) -> dict[int, Tensor]:
        masters: dict[int, Tensor] = {}
        for number, place in enumerate(self.places):
            value = place.local.parameter.detach().to(self._wide)
            whole = self._gathered(place, value) if place.on_data_owner else None
            if place.mine:
                assert whole is not None
                masters[number] = torch.nn.Parameter(whole.clone())
        return masters

    def _create_state(self) -> None:
        """Makes all state at once, so that memory and checkpoints are the same throughout: a step of no gradient, no
        learning rate, and none counted."""
        if not self.masters:
            return
        before = {number: master.detach().clone() for number, master in self.masters.items()}
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, 0.0)
            optimizer.step()
        with torch.no_grad():
            for number, master in self.masters.items():
                master.grad = None
                master.copy_(before[number])
        self.set_steps_taken(0)
        for number, local in enumerate(self.parameters):
            if number in self.masters:
                self._check_state(local, {name: tuple(value.shape) for name, value in self._state(number).items()})

    def _check_state(self, local: LocalParameter, found: dict[str, tuple[int, ...]]) -> None:
        """What is kept is what the optimizer's rule says: it is what memory and checkpoints are computed from."""
        said = dict(RULES[self.config.name].states(local.name, local.whole_shape, self.config))
        if found != said:
            name = self.config.name
            raise RuntimeError(f"the optimizer {name} keeps {found} of {local.name}, where its rule says {said}")

    def _state(self, number: int) -> dict[str, Tensor]:
        """The tensors that are kept of an owned parameter, its step's count excepted."""
        master = self.masters[number]
        for optimizer in self.optimizers:
            if master in optimizer.state:
                state = optimizer.state[master]
                return {name: value for name, value in state.items() if name != "step" and isinstance(value, Tensor)}
        return {}

    @property
    def gradient_scale(self) -> float:
        return self.loss_scale.value

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        for gradient in self.gradients:
            gradient.zero_()
        yield
        reduce_tied(self.parameters, self.gradients, self.topology)
        for place, gradient in zip(self.places, self.gradients, strict=True):
            if place.data_owner is None:
                dist.all_reduce(gradient, group=place.data_group)
            else:
                dist.reduce(gradient, group=place.data_group, group_dst=place.data_owner)
            if self.loss_scale.dynamic:
                gradient.div_(self.loss_scale.value)

    def all_but_last_micro_batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The global gradient norm [], each parameter of the model counted once, by one data-parallel rank."""
        squares = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        counted = (
            (place.local, gradient)
            for place, gradient in zip(self.places, self.gradients, strict=True)
            if (place.data_group.rank() == 0 if place.data_owner is None else place.on_data_owner)
        )
        add_squares(squares, counted, self.topology)
        dist.all_reduce(squares)
        return squares.sqrt()

    @torch.no_grad()
    def step(self, learning_rate: float, refuses: Refuses = never) -> tuple[Tensor, Tensor]:
        norm = self.norm()
        refused = self.loss_scale.refusal(norm, refuses)
        if refused.item():  # any torch optimizer steps here, and few can be told on the device to leave all as it is
            self.follow()
            return norm, refused
        factor = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0) if self.config.clip_norm > 0 else None
        for number, (place, gradient) in enumerate(zip(self.places, self.gradients, strict=True)):
            if not place.on_data_owner:
                continue
            if factor is not None:
                gradient.mul_(factor)
            whole = self._gathered(place, gradient)
            if place.mine:
                self.masters[number].grad = whole
        for optimizer in self.optimizers:
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()
        for master in self.masters.values():
            master.grad = None
        self.follow()
        return norm, refused

    def _gathered(self, place: _Place, value: Tensor) -> Tensor:
        """The whole of a parameter-shaped tensor, right on the owner; its tensor ranks call this together."""
        if not place.cut:
            return value
        whole = torch.zeros(place.local.whole_shape, dtype=value.dtype, device=value.device)
        for shard, part in _parts(place.local, whole):
            part.copy_(shard.of(value))
        dist.reduce(whole, group=place.tensor_group, group_dst=place.tensor_owner)
        return whole

    @torch.no_grad()
    def follow(self) -> None:
        for number, place in enumerate(self.places):
            weight = place.local.parameter.data
            if place.on_data_owner:
                whole = weight
                if place.cut:
                    whole = torch.empty(place.local.whole_shape, dtype=weight.dtype, device=weight.device)
                if place.mine:
                    whole.copy_(self.masters[number])
                dist.broadcast(whole, group=place.tensor_group, group_src=place.tensor_owner)
                if place.cut:
                    for shard, part in _parts(place.local, whole):
                        shard.of(weight).copy_(part)
            if place.data_owner is not None:
                dist.broadcast(weight, group=place.data_group, group_src=place.data_owner)

    def gradient(self, local: LocalParameter) -> Tensor:
        number = self._index[local.parameter]
        place, gradient = self.places[number], self.gradients[number]
        if place.data_owner is not None:
            dist.broadcast(gradient, group=place.data_group, group_src=place.data_owner)
        return gradient

    def kinds(self, local: LocalParameter) -> tuple[str, ...]:
        return tuple(RULES[self.config.name].states(local.name, local.whole_shape, self.config))

    def pieces(self, local: LocalParameter, kind: str) -> Iterable[ShardedTensor]:
        number = self._index[local.parameter]
        place = self.places[number]
        if place.mine:
            value = self._kept(number, kind)
            yield _described(local, value, key=f"{kind}.{local.name}", copy=place.data_owner is None)

    def observed(self, local: LocalParameter, kind: str) -> list[tuple[ShardedTensor, Tensor]]:
        number = self._index[local.parameter]
        if not self.places[number].mine:
            return []
        value = self._kept(number, kind)
        return [(_described(local, value, key=local.name, copy=False), value)]

    def _kept(self, number: int, kind: str) -> Tensor:
        return self.masters[number].detach() if kind == Kind.weight else self._state(number)[kind]

    def set_steps_taken(self, steps: int) -> None:
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"].fill_(steps)
                elif "step" in state:
                    state["step"] = steps

    def live(self) -> Tensors:
        parameters: list[Any] = list(self.module.parameters())
        return {
            "weights": [parameter.data for parameter in parameters],
            "masters": [master.data for master in self.masters.values()],
            "moments": [value for number in self.masters for value in self._state(number).values()],
            "gradients": [*self.gradients, *(parameter.grad for parameter in parameters)],
            "buffers": [],
        }


def _places(parameters: Sequence[LocalParameter], topology: Topology) -> list[_Place]:
    places: dict[int, _Place] = {}
    for expert in (False, True):
        numbers = [number for number, local in enumerate(parameters) if local.expert == expert]
        data_group = topology.expert_data_parallel_group if expert else topology.data_parallel_group
        tensor_group = topology.groups.expt_tp if expert else topology.groups.tp
        sharers = data_group.size() if topology.config.zero_stage else 1
        elements = [torch.Size(parameters[number].whole_shape).numel() for number in numbers]
        for number, owner in zip(numbers, owners(elements, sharers * tensor_group.size()), strict=True):
            places[number] = _Place(
                local=parameters[number],
                data_group=data_group,
                tensor_group=tensor_group,
                data_owner=owner // tensor_group.size() if topology.config.zero_stage else None,
                tensor_owner=owner % tensor_group.size(),
            )
    return [places[number] for number in range(len(parameters))]


def _parts(local: LocalParameter, whole: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Each shard of this rank with its part of the whole parameter, a view."""
    for shard in local.shards:
        described = shard.description
        offset = described.global_offset[described.prepend_axis_num :]
        place = tuple(slice(start, start + size) for start, size in zip(offset, described.local_shape, strict=True))
        yield shard, whole[place]


def _described(local: LocalParameter, value: Tensor, *, key: str, copy: bool) -> ShardedTensor:
    """A whole tensor of a parameter, or of an expert, as megatron-core describes it; its shape may be another."""
    like = local.shards[0].description
    ahead = like.prepend_axis_num
    assert isinstance(like.replica_id, tuple)
    *others, _, data_parallel = like.replica_id
    return replace(
        like,
        key=key,
        data=value,
        dtype=value.dtype,
        local_shape=tuple(value.shape),
        global_shape=(*like.global_shape[:ahead], *value.shape),
        global_offset=(*like.global_offset[:ahead], *(0 for _ in value.shape)),
        axis_fragmentations=None,
        replica_id=(*others, 0, data_parallel if copy else 0),
    )
