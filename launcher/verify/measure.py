"""What a model in a layout computes, in terms that do not depend on the layout.

`found` runs on each rank of a world: it takes steps and keeps every shard of every gradient, then of what the optimizer
holds. The names are global names, so that two layouts are compared parameter by parameter (launcher/verify/compare.py).

A world of one rank can be led: before each update its gradients are replaced by those that another layout found. So it
compares every step's gradients at the same weights, and every weight and moment after the same gradients; Adam's first
step is almost the sign of a gradient, and makes a rounding error of a tiny one a step of full size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launcher.assemble import make_engine
from launcher.config import RunConfig
from launcher.objective import objective_of
from launcher.verify.batches import Traits, slice_of, synthetic_batch
from parallel.engine import Engine
from parallel.parameters import LocalParameter
from parallel.topology import Topology
from parallel.updater import Kind, Refuses

Shards = list[tuple[Any, np.ndarray]]
"""megatron-core's descriptions of shards (global name, shape, offset), each with its values in float64."""

_EVALUATED_STEP = 99
"""The step whose batch is evaluated; no step that is trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model in a layout."""

    config: RunConfig
    """Tiny, with model.vocabulary_size; train.global_batch_size is that of a step, over all ranks."""
    ranks: int
    dtype: torch.dtype = torch.float32
    traits: Traits = field(default_factory=Traits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What one rank saw."""

    place: dict[str, int]
    """This rank's coordinate in each dimension."""
    evaluated: float
    """Loss of a batch of its own, before the first step."""
    losses: list[float]
    norms: list[float]
    """Global gradient norms before clipping."""
    gradients: list[Shards]
    """Of each step, reduced, before clipping."""
    state: dict[str, Shards]
    """After the last step."""
    held: dict[str, int]
    """Bytes that the rank holds before the last update, by kind (parallel.held)."""


def engine_of(case: Case) -> Engine:
    """The engine of a case on this rank, as `bloomery train` would make it."""
    vocabulary = case.config.model.vocabulary_size
    assert vocabulary is not None
    return make_engine(
        case.config,
        vocabulary_size=vocabulary,
        topology=Topology.create(case.config.parallel),
        objective=objective_of(case.config),
        dtype=case.dtype,
    )


def batch_of(case: Case, step: int, topology: Topology) -> dict[str, Tensor]:
    """This rank's part of the global batch of a step."""
    return slice_of(synthetic_batch(case.config, step, case.traits), topology)


def found(case: Case, *, steps: int, led_by: Sequence[Mapping[str, np.ndarray]] | None = None) -> Found:
    """Takes `steps` steps on this rank of a world; led by the whole gradients of each step, if given (stage 0 only)."""
    engine = engine_of(case)
    evaluated = float(engine.evaluate(batch_of(case, _EVALUATED_STEP, engine.topology)).loss)
    gradients: list[Shards] = []
    losses, norms = [], []
    update = engine.updater.step
    held: dict[str, int] = {}

    def look_then_update(learning_rate: float, refuses: Refuses) -> tuple[Tensor, Tensor]:
        held.update(engine.held())
        gradients.append(_shards(engine, engine.updater.gradient))
        if led_by is not None:
            _replace(engine, led_by[len(gradients) - 1])
        return update(learning_rate, refuses)

    engine.updater.step = look_then_update  # type: ignore[method-assign]
    for step in range(steps):
        result = engine.step(batch_of(case, step, engine.topology))
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    state = _state(engine)
    return Found(
        place=_place(engine.topology),
        evaluated=evaluated,
        losses=losses,
        norms=norms,
        gradients=gradients,
        state=state,
        held=held,
    )


def _state(engine: Engine) -> dict[str, Shards]:
    """What the optimizer holds by kind, as far as this rank knows; all ranks call this together."""
    state: dict[str, Shards] = {}
    for local in engine.parameters:
        for kind in (Kind.weight.value, *engine.updater.kinds(local)):
            seen = engine.updater.observed(local, kind)
            state.setdefault(kind, []).extend((described, value.double().numpy().copy()) for described, value in seen)
    return state


def _place(topology: Topology) -> dict[str, int]:
    return {
        "tensor": topology.tensor_rank,
        "pipeline": topology.pipeline_rank,
        "context": topology.context.rank,
        "data": topology.data_parallel_rank,
    }


def _shards(engine: Engine, value: Callable[[LocalParameter], Tensor]) -> Shards:
    """Every shard that this rank holds of what `value` gives for its parameters; all ranks call this together."""
    shards: Shards = []
    for local in engine.parameters:
        whole = value(local)
        shards.extend((shard.description, shard.of(whole).double().numpy().copy()) for shard in local.shards)
    return shards


def contributions(case: Case) -> dict[tuple[int, int], tuple[float, dict[str, np.ndarray]]]:
    """What each micro-batch of each data-parallel rank adds to the first step's gradient; on a world of one rank.

    `case` is the oracle; its whole batch is that of all ranks. Returns, by first and last sample of a group of
    train.micro_batch_size, the weight of its tokens and its part of the gradient by global name.
    """
    engine = engine_of(case)
    batch = batch_of(case, 0, engine.topology)
    weights = batch["loss_weights"]
    size = case.config.train.micro_batch_size
    parts = {}
    for first in range(0, len(weights), size):
        own = torch.zeros_like(weights)
        own[first : first + size] = weights[first : first + size]
        share = float(own.sum() / weights.sum())
        engine.accumulate({**batch, "loss_weights": own})
        shards = _shards(engine, engine.updater.gradient)
        gradient = {described.key: np.zeros(described.global_shape) for described, _ in shards}
        for described, value in shards:
            target = gradient[described.key][described.global_slice()]
            target[...] = value.reshape(target.shape) * share
        parts[first, first + size] = float(own.sum()), gradient
    return parts


@torch.no_grad()
def _replace(engine: Engine, gradients: Mapping[str, np.ndarray]) -> None:
    for local in engine.parameters:
        own = engine.updater.gradient(local)
        for shard in local.shards:
            described = shard.description
            given = gradients[described.key][described.global_slice()]
            shard.of(own).copy_(torch.from_numpy(given).view(described.local_shape))
