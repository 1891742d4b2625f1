"""The engine that the benchmarks measure: a model on this rank, AdamW at a constant rate."""

import torch

from model.build import build
from model.config import ModelConfig
from model.objectives import Prediction
from parallel.config import Logits, OptimizerConfig, ParallelConfig, ScheduleConfig, ScheduleName
from parallel.engine import Engine
from parallel.schedules import Schedule
from parallel.topology import Topology


def engine_of(
    model: ModelConfig,
    *,
    vocabulary_size: int,
    sequence: int,
    micro_batch: int,
    layout: ParallelConfig,
    dtype: torch.dtype = torch.float32,
    learning_rate: float = 1e-3,
    device: torch.device | None = None,
    in_eight_bits: bool = False,
) -> Engine:
    """On the device that the topology chooses by itself, or on the one given; every rank calls this."""
    topology = Topology.create(layout, device=device)
    optimizer = OptimizerConfig(learning_rate=learning_rate, schedule=ScheduleConfig(name=ScheduleName.constant))
    chunks = build(
        model,
        vocabulary_size=vocabulary_size,
        sequence_length=sequence,
        dtype=dtype,
        topology=topology,
        seed=1,
        in_eight_bits=in_eight_bits,
    )
    if layout.logits is Logits.chunked:
        for chunk in chunks:
            chunk.predict_in_chunks(z_loss=0.0)
    return Engine(
        chunks,
        objective=Prediction(),
        topology=topology,
        optimizer=optimizer,
        schedule=Schedule(optimizer, total_steps=1),
        micro_batch_size=micro_batch,
        sequence_length=sequence,
    )
