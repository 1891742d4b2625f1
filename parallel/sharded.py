"""ZeRO stage 1, our own: masters and moments cut over the data-parallel ranks, gradients reduced while others are
computed.

    gradients [bucket, fp32]  --reduced to their owners, in the last backward pass-->  own part  --AdamW-->  masters
    masters  --rounded-->  own part of the weights  --all-gather-->  weights [bucket]

Source: Rajbhandari et al., 2020, arXiv:1910.02054; buckets in the order of the backward pass as in Li et al., 2020,
arXiv:2006.15704. Parameters that are stepped alike lie one behind another in buckets, the last ones first. A
parameter's weight and its gradient sum are views of its bucket, so that autograd adds in place, the optimizer steps in
place, and nothing is flattened or copied on the way. Each rank owns an equal part of each bucket.

Contract: buckets leave strictly in their order, whatever order their gradients come in and whether they come at all, so
that all ranks call the same collectives; what has not left during the backward pass leaves after it. Where there is no
last backward pass in which gradients are complete (`parallel.mechanism`), all of them leave after it.

Trade-off: gradients stay whole in fp32 on every rank, as stage 1 has it; they are reduced in place, without buffers.
Weights are gathered before the next forward pass begins, not beside it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.config import OptimizerConfig
from parallel.fragments import observed_fragments, pieces_of_fragments, whole_value
from parallel.held import Tensors
from parallel.loss_scale import LossScale
from parallel.mechanism import Reduction, mechanism
from parallel.memory import in_buckets, padded
from parallel.optimizer import adamw, create_state, set_learning_rate, set_refused, set_steps
from parallel.parameters import Fragment, LocalParameter, setting_of
from parallel.topology import Topology, add_up
from parallel.updater import MOMENTS, Kind, Refuses, add_into, add_squares, never, reduce_tied

_GRADIENT = "gradient"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a parameter lies in its bucket."""

    local: LocalParameter
    start: int

    @property
    def stop(self) -> int:
        """One more than its last element."""
        return self.start + self.local.shape.numel()

    def of(self, flat: Tensor) -> Tensor:
        """Its part of a tensor of the bucket, a view of its shape."""
        return flat[self.start : self.stop].view(self.local.shape)


def _own(flat: Tensor, group: ProcessGroup) -> Tensor:
    return flat.chunk(group.size())[group.rank()]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Bucket:
    """Parameters that are reduced, stepped and gathered together."""

    group: ProcessGroup
    places: list[_Place]
    weights: Tensor
    """[elements], of the model's dtype."""
    gradients: Tensor
    """[elements] float32: sums over micro-batches, then over ranks."""
    master: Tensor
    """[elements / ranks] float32, this rank's part; its gradient is a view of `gradients`."""
    missing: set[torch.nn.Parameter] = field(default_factory=set)
    """Parameters whose gradients of this step are not complete."""

    def own(self, flat: Tensor) -> Tensor:
        """This rank's part of a tensor of the bucket, a view."""
        return _own(flat, self.group)

    def fragment(self, place: _Place, own: Tensor) -> Fragment | None:
        """What this rank's part of a tensor of the bucket has of a parameter."""
        first = self.group.rank() * own.numel()
        start, stop = max(first, place.start), min(first + own.numel(), place.stop)
        if start >= stop:
            return None
        return Fragment(start=start - place.start, value=own[start - first : stop - first])

    def reduce(self) -> dist.Work | None:
        """Begins to sum the gradients over the ranks; afterwards each rank's own part is the sum."""
        if self.group.size() == 1:
            return None
        if self.gradients.is_cuda:
            own = self.own(self.gradients)
            return dist.reduce_scatter_tensor(own, self.gradients, group=self.group, async_op=True)
        # Over gloo, reduce-scatter is an all-reduce of a copy.
        return dist.all_reduce(self.gradients, group=self.group, async_op=True)

    def gather(self) -> dist.Work | None:
        """Rounds this rank's masters and begins to give all ranks all weights."""
        own = self.own(self.weights)
        own.copy_(self.master)
        if self.group.size() == 1:
            return None
        return dist.all_gather_into_tensor(self.weights, own, group=self.group, async_op=True)


class ShardedUpdater:
    """Gradients to a step, each rank stepping its part."""

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
        how = mechanism(
            topology.config,
            tied=any(local.tied for local in parameters),
            sharers=topology.data_parallel_group.size(),
        )
        self._in_backward = how.reduction is Reduction.in_last_backward
        self._clip_norm = config.clip_norm
        self.buckets = _buckets(parameters, config, topology)
        self._found = {place.local.parameter: (bucket, place) for bucket in self.buckets for place in bucket.places}
        for bucket in self.buckets:
            for place in bucket.places:
                place.local.parameter.register_post_accumulate_grad_hook(self._hook(bucket, place))
        firsts = [bucket.places[0].local for bucket in self.buckets]  # all of a bucket are stepped alike
        self.optimizer = adamw(firsts, [bucket.master for bucket in self.buckets], config)
        create_state(self.optimizer)
        self.loss_scale = LossScale(dynamic=parameters[0].parameter.dtype == torch.float16)
        self._last_micro_batch = False
        self._left = 0
        self._reductions: list[dist.Work | None] = []

    @property
    def gradient_scale(self) -> float:
        return self.loss_scale.value

    def _hook(self, bucket: _Bucket, place: _Place) -> Callable[[Tensor], None]:
        """Adds a parameter's fresh gradient to its sum, and sends off what is complete."""
        total = place.of(bucket.gradients)
        add = add_into(total)
        in_place = place.local.parameter.grad is not None  # autograd has added to it

        def arrived(parameter: Tensor) -> None:
            if not in_place:
                add(parameter)
            if self._in_backward and self._last_micro_batch:
                if place.local.parameter not in bucket.missing:
                    raise RuntimeError(f"{place.local.name} got a second gradient in the last backward pass")
                bucket.missing.remove(place.local.parameter)
                self._send()

        return arrived

    def _send(self, *, everything: bool = False) -> None:
        """Begins the reduction of the next buckets, as far as they are complete."""
        while self._left < len(self.buckets) and (everything or not self.buckets[self._left].missing):
            self._reductions.append(self.buckets[self._left].reduce())
            self._left += 1

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        torch._foreach_zero_([bucket.gradients for bucket in self.buckets])
        for bucket in self.buckets:
            bucket.missing.update(place.local.parameter for place in bucket.places)
        self._left, self._reductions, self._last_micro_batch = 0, [], True
        yield
        if not self._in_backward:
            totals = [place.of(bucket.gradients) for bucket, place in map(self._place, self.parameters)]
            reduce_tied(self.parameters, totals, self.topology)
        self._send(everything=True)
        _wait(self._reductions)
        if self.loss_scale.dynamic:
            torch._foreach_div_(self._own_gradients(), self.loss_scale.value)

    @contextmanager
    def _not_the_last(self) -> Iterator[None]:
        self._last_micro_batch = False
        try:
            yield
        finally:
            self._last_micro_batch = True

    def all_but_last_micro_batch(self) -> AbstractContextManager[None]:
        return self._not_the_last() if self._in_backward else nullcontext()

    def _place(self, local: LocalParameter) -> tuple[_Bucket, _Place]:
        return self._found[local.parameter]

    def _own_gradients(self) -> list[Tensor]:
        return [bucket.own(bucket.gradients) for bucket in self.buckets]

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The global gradient norm [], each parameter of the model counted once: no two ranks own the same of one."""
        squares = torch.zeros((), dtype=torch.float64, device=self.topology.device)
        held = ((local, fragment.value) for local in self.parameters for fragment in self.fragments(local, _GRADIENT))
        add_squares(squares, held, self.topology)
        add_up(squares)
        return squares.sqrt()

    @torch.no_grad()
    def step(self, learning_rate: float, refuses: Refuses = never) -> tuple[Tensor, Tensor]:
        norm = self.norm()
        refused = self.loss_scale.refusal(norm, refuses)
        if self._clip_norm > 0:
            factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(self._own_gradients(), factor.float())
        set_learning_rate(self.optimizer, learning_rate)
        set_refused(self.optimizer, refused)
        self.optimizer.step()
        self.follow()
        return norm, refused

    @torch.no_grad()
    def follow(self) -> None:
        _wait([bucket.gather() for bucket in self.buckets])

    def gradient(self, local: LocalParameter) -> Tensor:
        return whole_value(self, local, _GRADIENT)

    def kinds(self, local: LocalParameter) -> tuple[str, ...]:
        return MOMENTS

    def fragments(self, local: LocalParameter, kind: str) -> list[Fragment]:
        bucket, place = self._place(local)
        if kind == _GRADIENT:
            own = bucket.own(bucket.gradients)
        else:
            own = bucket.master.detach() if kind == Kind.weight else self.optimizer.state[bucket.master][kind]
        found = bucket.fragment(place, own)
        return [] if found is None else [found]

    def pieces(self, local: LocalParameter, kind: str) -> Iterable[ShardedTensor]:
        return pieces_of_fragments(self, local, kind)

    def observed(self, local: LocalParameter, kind: str) -> list[tuple[ShardedTensor, Tensor]]:
        return observed_fragments(self, local, kind)

    def sharers(self, local: LocalParameter) -> ProcessGroup:
        return self._place(local)[0].group

    def set_steps_taken(self, steps: int) -> None:
        set_steps(self.optimizer, steps)

    def live(self) -> Tensors:
        parameters = list(self.module.parameters())
        return {
            "weights": [*(bucket.weights for bucket in self.buckets), *(parameter.data for parameter in parameters)],
            "masters": [bucket.master for bucket in self.buckets],
            "moments": [state[moment] for state in self.optimizer.state.values() for moment in MOMENTS],
            "gradients": [*(bucket.gradients for bucket in self.buckets), *(each.grad for each in parameters)],
            "buffers": [],
        }


def _wait(works: Iterable[dist.Work | None]) -> None:
    for work in works:
        if work is not None:
            work.wait()


@torch.no_grad()
def _buckets(parameters: Sequence[LocalParameter], config: OptimizerConfig, topology: Topology) -> list[_Bucket]:
    """In the order in which the backward pass completes them; parameters become views of them."""
    numbers: dict[tuple[bool, bool, object], list[int]] = {}
    for number, local in enumerate(parameters):
        key = (local.expert, local.is_matrix, setting_of(local, config))
        numbers.setdefault(key, []).append(number)
    elements = [local.shape.numel() for local in parameters]
    found = [
        [members[index] for index in bucket]
        for members in numbers.values()
        for bucket in in_buckets([elements[number] for number in members], total=sum(elements))
    ]
    found.sort(key=min, reverse=True)
    return [_bucket([parameters[number] for number in bucket], topology) for bucket in found]


def _bucket(members: Sequence[LocalParameter], topology: Topology) -> _Bucket:
    group = topology.expert_data_parallel_group if members[0].expert else topology.data_parallel_group
    like, places, start = members[0].parameter, [], 0
    for local in members:
        places.append(_Place(local=local, start=start))
        start = places[-1].stop
    weights = torch.zeros(padded(start, group.size()), dtype=like.dtype, device=like.device)
    gradients = torch.zeros_like(weights, dtype=torch.float32)
    for place in places:
        parameter = place.local.parameter
        place.of(weights).copy_(parameter)
        parameter.data = place.of(weights)
        if parameter.dtype == torch.float32:
            parameter.grad = place.of(gradients)
    master = _own(weights, group).float().clone()
    master.grad = _own(gradients, group)
    return _Bucket(group=group, places=places, weights=weights, gradients=gradients, master=master)
