"""A tiny model in any layout: what one step finds, in terms that do not depend on the layout.

`found` runs on each rank of a world; `whole` puts the ranks' shards together. Names are global names, so two layouts
are compared parameter by parameter.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from model.build import build
from model.config import ModelConfig
from model.objectives import causal_language_modelling
from parallel.config import OptimizerConfig, ParallelConfig, ScheduleConfig, ScheduleName
from parallel.engine import Engine
from parallel.optimizer import Kind
from parallel.schedules import Schedule
from parallel.topology import Topology

MODEL = ModelConfig(layers=4, hidden_size=32, heads=4, kv_heads=2, ffn_hidden_size=48, initial_std=0.1)
VOCABULARY, SEQUENCE, SAMPLES = 256, 16, 8


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the matrix."""

    name: str
    ranks: int
    layout: ParallelConfig
    dtype: torch.dtype = torch.float32
    tied: bool = False
    micro_batch_size: int = 1
    clip_norm: float = 0.5


def batch(step: int, samples: int = SAMPLES) -> dict[str, torch.Tensor]:
    """The global batch of a step: packed documents, and rows whose tokens count unequally."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (samples, SEQUENCE + 1), generator=generator)
    document_ids = torch.zeros(samples, SEQUENCE, dtype=torch.int32)
    document_ids[1::2, 5:] = 1
    document_ids[1::4, 11:] = 2
    positions = torch.arange(SEQUENCE).repeat(samples, 1)
    positions[1::2, 5:] -= 5
    positions[1::4, 11:] -= 6
    weights = torch.ones(samples, SEQUENCE)
    weights[:, : step % 3] = 0
    weights[-1, 4:] = 0
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_weights": weights,
        "positions": positions,
        "document_ids": document_ids,
        "sample_ids": torch.arange(samples),
    }


def make_engine(row: Row) -> Engine:
    """The engine of a row on this rank."""
    topology = Topology.create(row.layout)
    chunks = build(
        replace(MODEL, tie_embeddings=row.tied),
        vocabulary_size=VOCABULARY,
        sequence_length=SEQUENCE,
        dtype=row.dtype,
        topology=topology,
        seed=7,
    )
    optimizer = OptimizerConfig(
        learning_rate=1e-2, clip_norm=row.clip_norm, schedule=ScheduleConfig(name=ScheduleName.constant)
    )
    return Engine(
        chunks,
        objective=causal_language_modelling,
        topology=topology,
        optimizer=optimizer,
        schedule=Schedule(optimizer, total_steps=10),
        micro_batch_size=row.micro_batch_size,
        sequence_length=SEQUENCE,
    )


def slice_of(whole_batch: dict[str, torch.Tensor], topology: Topology) -> dict[str, torch.Tensor]:
    """This data-parallel rank's contiguous part of a global batch."""
    share = SAMPLES // topology.data_parallel_size
    first = topology.data_parallel_rank * share
    return {name: tensor[first : first + share] for name, tensor in whole_batch.items()}


def found(row: Row, steps: int = 2) -> dict[str, Any]:
    """Loss, norm, gradient shards of `steps` steps, then weights and moments, from this rank's view."""
    engine = make_engine(row)
    gradients: list[Any] = []
    losses, norms = [], []
    take = engine.updater.step

    def look_then_step(learning_rate: float) -> torch.Tensor:
        gradients.append(
            [
                (shard.description, shard.of(engine.updater.gradient(local)).double().numpy().copy())
                for local in engine.parameters
                for shard in local.shards
            ]
        )
        return take(learning_rate)

    engine.updater.step = look_then_step  # type: ignore[method-assign]
    for step in range(steps):
        result = engine.step(slice_of(batch(step), engine.topology))
        losses.append(float(result.loss))
        norms.append(float(result.grad_norm))
    state = {
        kind: [
            (shard.description, shard.of(engine.updater.get(local, kind)).double().numpy().copy())
            for local in engine.parameters
            for shard in local.shards
        ]
        for kind in Kind
    }
    evaluated = float(engine.evaluate(slice_of(batch(99), engine.topology)).loss)
    return {"losses": losses, "norms": norms, "gradients": gradients, "state": state, "evaluated": evaluated}


def whole(per_rank: list[list[tuple[Any, np.ndarray]]]) -> dict[str, np.ndarray]:
    """Global tensors by global name from every rank's shards; replicas must agree exactly with each other."""
    tensors: dict[str, np.ndarray] = {}
    for shards in per_rank:
        for description, value in shards:
            target = tensors.setdefault(description.key, np.full(description.global_shape, np.nan))
            place = description.global_slice()
            before = target[place]
            assert np.isnan(before).all() or np.array_equal(before, value.reshape(before.shape)), description.key
            target[place] = value.reshape(before.shape)
    assert not any(np.isnan(tensor).any() for tensor in tensors.values())
    return tensors


def worst(ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest relative error over parameters, and whose it is (INTERFACES.md, "Comparing layouts")."""
    assert ours.keys() == reference.keys()
    floor = 1e-6 * np.sqrt(sum(float((tensor**2).sum()) for tensor in reference.values()))
    return max(
        (float(np.linalg.norm(ours[name] - reference[name]) / max(np.linalg.norm(reference[name]), floor)), name)
        for name in reference
    )
