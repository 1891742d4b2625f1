"""The tiny model that tests put into layouts."""

from dataclasses import replace
from typing import Any

import torch

from launcher.config import RunConfig, RunSection, TrainConfig
from launcher.verify.measure import Case
from model.config import ModelConfig
from parallel.config import OptimizerConfig, ParallelConfig, ScheduleConfig, ScheduleName

VOCABULARY, SEQUENCE, SAMPLES = 256, 16, 8
MODEL = ModelConfig(
    layers=4, hidden_size=32, heads=4, kv_heads=2, ffn_hidden_size=48, initial_std=0.1, vocabulary_size=VOCABULARY
)


def tiny(
    ranks: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    micro_batch_size: int = 2,
    zero_stage: int = 1,
    layers: int = 4,
    **layout: Any,
) -> Case:
    """The tiny model on so many ranks; `layout` are fields of `ParallelConfig`."""
    config = RunConfig(
        run=RunSection(name="tiny", seed=7),
        model=replace(MODEL, layers=layers, tie_embeddings=tied),
        train=TrainConfig(
            steps=10, global_batch_size=SAMPLES, micro_batch_size=micro_batch_size, sequence_length=SEQUENCE
        ),
        parallel=ParallelConfig(zero_stage=zero_stage, **layout),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, clip_norm=0.5, schedule=ScheduleConfig(name=ScheduleName.constant)
        ),
    )
    return Case(config=config, ranks=ranks, dtype=dtype)
