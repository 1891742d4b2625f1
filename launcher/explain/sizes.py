"""The parameters of every pipeline stage of a model in a layout, without memory for them and without ranks.

The model is built as `bloomery train` builds it, on torch's meta device, in a process group that only counts its ranks:
a 70 B model in eight stages takes two seconds. So no formula has to know what a layer consists of.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.build import build
from model.config import ModelConfig
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.memory import Size
from parallel.parameters import LocalParameter, local_parameters, setting_of
from parallel.rules import is_frozen, state_words
from parallel.topology import Topology

_META = torch.device("meta")


def stage_sizes(
    model: ModelConfig, layout: ParallelConfig, *, vocabulary_size: int, optimizer: OptimizerConfig
) -> list[list[Size]]:
    """The parameters of one rank of each pipeline stage; `data` ranks do not matter, so there are as few as can be."""
    model_ranks = layout.tensor * layout.pipeline * layout.context
    ranks = next(
        model_ranks * data for data in range(1, layout.expert + 1) if data * layout.context % layout.expert == 0
    )
    first_ranks = range(0, ranks, ranks // layout.pipeline)
    return [_sizes_on(rank, ranks, model, layout, vocabulary_size, optimizer) for rank in first_ranks]


def sizes(parameters: Sequence[LocalParameter], optimizer: OptimizerConfig) -> list[Size]:
    """What memory depends on."""
    return [_size(local, optimizer) for local in parameters]


def _size(local: LocalParameter, optimizer: OptimizerConfig) -> Size:
    return Size(
        elements=local.shape.numel(),
        group=f"{local.is_matrix} {setting_of(local, optimizer)}",
        is_expert=local.expert,
        is_frozen=local.frozen or is_frozen(local.name, optimizer),
        whole_elements=math.prod(local.whole_shape),
        state_elements=state_words(local.name, local.whole_shape, optimizer),
    )


def _sizes_on(
    rank: int, ranks: int, model: ModelConfig, layout: ParallelConfig, vocabulary_size: int, optimizer: OptimizerConfig
) -> list[Size]:
    with _imagined(rank, ranks), _META:
        chunks = build(
            model,
            vocabulary_size=vocabulary_size,
            sequence_length=model.positions or 2,
            dtype=torch.float32,
            topology=Topology.create(layout, device=_META),
            seed=0,
        )
        return sizes(local_parameters(chunks, last_stage_of_several=False), optimizer)


@contextmanager
def _imagined(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
