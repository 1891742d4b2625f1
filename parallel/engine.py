"""One training step, whatever the layout: micro-batches through megatron-core's schedule, gradients to one update.

    batch -> micro-batches -> forward and backward on every pipeline stage -> reduced gradients -> clipped update

Contract: `step` and `evaluate` take this data-parallel slice's batch and return the same numbers on every rank. The
loss is a weighted sum over a weighted count, divided once over all ranks, so that neither the number of micro-batches
nor of ranks changes it. The model and its objective know nothing of this file; ZeRO stands behind `Updater`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from parallel.average import AVERAGE, WeightAverage
from parallel.common.stateful import Stateful
from parallel.config import OptimizerConfig
from parallel.fragments import Held
from parallel.frozen import frozen_pieces, trained_and_frozen
from parallel.held import held
from parallel.mechanism import mechanism
from parallel.optimizer import PlainUpdater
from parallel.parameters import local_parameters
from parallel.schedules import Schedule
from parallel.sharded import ShardedUpdater
from parallel.topology import Topology, add_up
from parallel.updater import Kind, Updater, never
from parallel.whole import WholeUpdater
from parallel.zero import ZeroUpdater

Batch = Mapping[str, Tensor]


class Objective(Protocol):
    """What is minimised."""

    @property
    def reports(self) -> Sequence[str]:
        """Names of what it measures beside the loss; the same on all ranks."""
        ...

    def __call__(self, outputs: Any, batch: Batch, tensor_group: Any, /) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """From what the model gives: a loss sum [], its weight sum [], and for each of `reports` a sum and its weight,
        [2]. The batch has, beside its own fields, the global sum of each of its weights under `NAME_sum`."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step found; tensors stay on the device until somebody reads them."""

    loss: Tensor
    """[] float64, mean loss in nats over the global batch, weighted."""
    weight: Tensor
    """[] float64, the sum of the weights: tokens that counted."""
    grad_norm: Tensor
    """[] before clipping; zero in an evaluation."""
    learning_rate: float
    refused: Tensor
    """[] 1 where no weight changed, because fp16 gradients overflowed (the next step has a smaller scale) or the update
    was refused; else 0."""
    seconds: Mapping[str, float]
    """Host seconds by phase: `forward_backward`, `communication`, `optimizer`, and `save`, before the update."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """What the model reports of a training step beside its loss (of its routers, for one), each []."""
    reported: Mapping[str, Tensor] = field(default_factory=dict)
    """What the objective reports, a sum over the global batch and its weight, each [2] float64."""


class Reporting(Protocol):
    """What the engine asks of a chunk beside its forward pass."""

    def take_sums(self) -> Tensor | None:
        """What it added up since the last call, of one shape on all ranks, to be summed over them; None if nothing."""
        ...

    def metrics(self, sums: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """What a step reports, from those sums and the batch's weight."""
        ...


class _Chunks(torch.nn.Module):
    """A rank's chunks as one module, which is what DeepSpeed wraps; `forward` picks the chunk."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)

    def forward(self, index: int, batch: Batch) -> Tensor:
        return self.chunks[index](batch)


class _Stage(torch.nn.Module):
    """One chunk as megatron-core's schedule wants to see it; forwards go through the updater's module."""

    def __init__(self, chunk: torch.nn.Module, index: int, run: Callable[[int, Batch], Tensor]) -> None:
        super().__init__()
        self.config: Any = chunk.config
        self.vp_stage = chunk.vp_stage
        self.set_input_tensor = chunk.set_input_tensor
        self.model_type = chunk.model_type
        self._run = partial(run, index)

    def forward(self, batch: Batch) -> Tensor:
        return self._run(batch)


def _updater(optimizer: OptimizerConfig, topology: Topology, *, tied: bool) -> Callable[..., Updater]:
    """What takes the steps; `parallel.mechanism` says why."""
    how = mechanism(topology.config, tied=tied, sharers=topology.data_parallel_group.size(), optimizer=optimizer.name)
    if how.whole_parameters:
        return WholeUpdater
    if how.own:
        return ShardedUpdater
    return ZeroUpdater if how.stage else PlainUpdater


class Engine:
    """The model of this rank, its optimizer, and the schedule that drives them."""

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        *,
        objective: Objective,
        topology: Topology,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        micro_batch_size: int,
        sequence_length: int,
    ) -> None:
        self.topology = topology
        self.schedule = schedule
        self.pulse: Callable[[str], None] = lambda _phase: None
        """Told which phase of a step begins: forward_backward, collective, save, optimizer."""
        self.refuses: Callable[[Tensor, Tensor], Tensor] = lambda _loss, norm: never(norm)
        """Asked before each update, with the step's loss and gradient norm; says yes on all ranks or on none, [] 1 or 0
        on the device. Whoever says yes calls `refused` once it knows itself."""
        self.before_update: Callable[[], None] = lambda: None
        """Returns when weights and moments may change."""
        self._objective = self._minimised = objective
        self._micro_batch_size = micro_batch_size
        several = topology.config.pipeline > 1
        everything = local_parameters(chunks, last_stage_of_several=several and topology.is_last_pipeline_stage)
        self.parameters, self.frozen = trained_and_frozen(everything, optimizer)
        tied = any(local.tied for local in self.parameters)
        self.updater: Updater = _updater(optimizer, topology, tied=tied)(
            _Chunks(chunks), self.parameters, config=optimizer, topology=topology
        )
        self.average = None
        if optimizer.average_decay is not None:
            self.average = WeightAverage(self._weights, decay=optimizer.average_decay)
        self._reporting = [cast(Reporting, chunk) for chunk in chunks]
        self._stages = [_Stage(chunk, index, self.updater.module) for index, chunk in enumerate(chunks)]
        self._gradient_factor = torch.ones((), dtype=torch.float64, device=topology.device)
        for stage in self._stages:
            stage.config.grad_scale_func = self._scale
            stage.config.no_sync_func = self.updater.all_but_last_micro_batch
        config = self._stages[0].config
        self._forward_backward = partial(
            get_forward_backward_func(
                pp_size=topology.config.pipeline, vp_size=config.virtual_pipeline_model_parallel_size
            ),
            forward_step_func=self._forward,
            model=self._stages,
            seq_length=sequence_length,
            micro_batch_size=micro_batch_size,
            p2p_communicator=P2PCommunicator(topology.groups.pp, config) if several else None,
            pg_collection=topology.groups,
        )

    def step(self, batch: Batch) -> StepResult:
        """One update from this slice's batch, a whole number of micro-batches: tensors [batch, ...] on the CPU."""
        accumulated = self.accumulate(batch)
        self.pulse("save")
        ran = time.perf_counter()
        self.before_update()
        self.pulse("optimizer")
        started = time.perf_counter()
        rate = self.schedule.learning_rate(self.schedule.steps_taken + 1)
        norm, refused = self.updater.step(rate, partial(self.refuses, accumulated.loss))
        self.schedule.steps_taken += 1
        if self.average is not None:
            self.average.update(self.schedule.steps_taken)
        seconds = {**accumulated.seconds, "save": started - ran, "optimizer": time.perf_counter() - started}
        return replace(accumulated, grad_norm=norm, refused=refused, learning_rate=rate, seconds=seconds)

    def accumulate(self, batch: Batch) -> StepResult:
        """All of a step but its update: afterwards `updater.gradient` answers. Norm and learning rate are zero."""
        self.pulse("forward_backward")
        started = time.perf_counter()
        batch = self.topology.context.cut(batch)
        weight = self._weight(batch)
        self._gradient_factor = self.updater.gradient_scale / weight.clamp(min=1e-12)
        with self.updater.accumulation():
            sums = self._run(batch, self._weight_sums(batch, weight), forward_only=False)
            ran = time.perf_counter()
            self.pulse("collective")
        reduced = time.perf_counter()
        found = self._result(sums, weight)
        seconds = {"forward_backward": ran - started, "communication": reduced - ran}
        return replace(found, seconds=seconds, metrics=self._metrics(weight))

    @contextmanager
    def asked(self, objective: Objective) -> Iterator[None]:
        """In the block `evaluate` asks this of what the model gives, not what is minimised."""
        self._objective = objective
        try:
            yield
        finally:
            self._objective = self._minimised

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> StepResult:
        """The loss of this slice's batch and its siblings', without an update."""
        started = time.perf_counter()
        batch = self.topology.context.cut(batch)
        weight = self._weight(batch)
        self.updater.module.train(False)
        sums = self._run(batch, self._weight_sums(batch, weight), forward_only=True)
        self.updater.module.train(True)
        found = self._result(sums, weight)
        return replace(found, seconds={"forward_backward": time.perf_counter() - started})

    def participants(self) -> dict[str, Stateful]:
        """What a checkpoint keeps: weights, optimizer state, steps taken, and the average of the weights."""
        average = {} if self.average is None else {AVERAGE: self.average}
        return {
            "model": Held(self._weights, loaded=self.updater.follow),
            "optimizer": Held(self._optimizer_state, loaded=self.updater.follow),
            "schedule": _Steps(self),
            **average,
        }

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds at this moment, by kind (`parallel.held`)."""
        averages = [] if self.average is None else self.average.values
        return held({**self.updater.live(), "averages": averages}, self.topology.device)

    def _weights(self) -> Iterator[ShardedTensor]:
        for local in self.parameters:
            yield from self.updater.pieces(local, Kind.weight)
        for local in self.frozen:
            yield from frozen_pieces(local)

    def _optimizer_state(self) -> Iterator[ShardedTensor]:
        for local in self.parameters:
            for kind in self.updater.kinds(local):
                yield from self.updater.pieces(local, kind)

    def restart_schedule(self) -> None:
        """Learning rates begin anew, while the moments go on to stand for the steps that they were made of."""
        self.updater.loss_scale.steps_not_taken -= self.schedule.steps_taken
        self.schedule.steps_taken = 0

    def _weight(self, batch: Batch) -> Tensor:
        """[] float64, the sum of the weights of the global batch, of which this slice is a part."""
        weight = batch["loss_weights"].sum(dtype=torch.float64).to(self.topology.device)
        add_up(weight, self.topology.data_parallel_group)
        return weight

    def _weight_sums(self, batch: Batch, weight: Tensor) -> dict[str, Tensor]:
        """The sum of each field of weights over the global batch, `weight` being that of the tokens."""
        others = sorted(name for name in batch if name.endswith("_weights") and name != "loss_weights")
        sums = {"loss_weights_sum": weight}
        if others:
            own = torch.stack([batch[name].sum(dtype=torch.float64) for name in others]).to(self.topology.device)
            add_up(own, self.topology.data_parallel_group)
            sums |= {f"{name}_sum": total for name, total in zip(others, own, strict=True)}
        return sums

    def _run(self, batch: Batch, weight_sums: Batch, *, forward_only: bool) -> Tensor:
        """All micro-batches through the schedule; the sum of the losses, then the pairs of sums that the objective
        reports, [1 + 2 x reports] (zero but on the last stage)."""
        if self.topology.device.type == "cuda":  # from other memory a copy waits for all that the device has to do
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        factor = {"loss_factor": self._gradient_factor} if self._objective is self._minimised else {}
        micro_batches = [
            {**dict(zip(batch, rows, strict=True)), **factor, **weight_sums}
            for rows in zip(*(tensor.split(self._micro_batch_size) for tensor in batch.values()), strict=True)
        ]
        outputs = self._forward_backward(
            data_iterator=[iter(micro_batches) for _ in self._stages],
            num_microbatches=len(micro_batches),
            forward_only=forward_only,
        )
        total = torch.zeros(1 + 2 * len(self._objective.reports), dtype=torch.float64, device=self.topology.device)
        for sums in outputs:
            total += sums
        return total

    def _forward(self, micro_batches: Iterator[Batch], stage: _Stage) -> tuple[Tensor, Callable[[Tensor], Any]]:
        batch = next(micro_batches)
        return stage(batch), partial(self._loss, batch)

    def _loss(self, batch: Batch, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What the schedule asks of the last stage: a loss to differentiate, a count (unused), what to report."""
        loss_sum, _, reported = self._objective(outputs, batch, self.topology.groups.tp)
        pairs = [reported[name].detach().double() for name in self._objective.reports]
        return loss_sum, torch.ones((), dtype=torch.int), torch.cat((loss_sum.detach().double()[None], *pairs))

    def _scale(self, loss: Tensor) -> Tensor:
        """A loss sum times what makes the reduced gradient that of the global mean."""
        return loss * self._gradient_factor.to(loss.dtype)

    def _metrics(self, weight: Tensor) -> dict[str, Tensor]:
        """What the chunks of all ranks added up in a step, put together."""
        sums = [found for chunk in self._reporting if (found := chunk.take_sums()) is not None]
        if not sums:
            return {}
        total = torch.stack(sums).sum(dim=0)
        add_up(total)
        return self._reporting[0].metrics(total, weight)

    def _result(self, sums: Tensor, weight: Tensor) -> StepResult:
        """From what `_run` gives, summed over data-parallel slices: the same on every rank, without an update."""
        if self.topology.tensor_rank or not self.topology.is_last_pipeline_stage:  # one tensor rank contributes
            sums.zero_()
        add_up(sums)
        loss = sums[0] / weight.clamp(min=1e-12)
        reported = dict(zip(self._objective.reports, sums[1:].view(-1, 2), strict=True))
        return StepResult(
            loss=loss,
            weight=weight,
            grad_norm=torch.zeros_like(loss),
            refused=never(loss),
            learning_rate=0.0,
            seconds={},
            reported=reported,
        )


class _Steps:
    """The count of steps, for the schedule and for AdamW's bias correction, and the loss scale."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        return {**self._engine.schedule.state_dict(), "loss_scale": self._engine.updater.loss_scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        schedule, updater = self._engine.schedule, self._engine.updater
        schedule.load_state_dict(state)
        updater.loss_scale.load_state_dict(state["loss_scale"])
        updater.set_steps_taken(schedule.steps_taken - updater.loss_scale.steps_not_taken)
