"""The parameters of every pipeline stage of a model in a layout, without memory for them and without ranks.

The model is built as `bloomery train` builds it, on torch's meta device, in a process group that only counts its ranks:
a 70 B model in eight stages takes two seconds. So no formula has to know what a layer consists of.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.build import build
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.memory import Size
from parallel.parameters import LocalParameter, local_parameters
from parallel.topology import Topology

_META = torch.device("meta")


def stage_sizes(model: ModelConfig, layout: ParallelConfig, *, vocabulary_size: int) -> list[list[Size]]:
    """The parameters of one rank of each pipeline stage; `data` ranks do not matter, so there are as few as can be."""
    model_ranks = layout.tensor * layout.pipeline * layout.context
    ranks = next(
        model_ranks * data for data in range(1, layout.expert + 1) if data * layout.context % layout.expert == 0
    )
    first_ranks = range(0, ranks, ranks // layout.pipeline)
    return [_sizes_on(rank, ranks, model, layout, vocabulary_size) for rank in first_ranks]


def sizes(parameters: Sequence[LocalParameter]) -> list[Size]:
    """What memory depends on."""
    return [
        Size(elements=local.shape.numel(), is_matrix=len(local.shape) > 1, is_expert=local.expert)
        for local in parameters
    ]


def _sizes_on(rank: int, ranks: int, model: ModelConfig, layout: ParallelConfig, vocabulary_size: int) -> list[Size]:
    with _imagined(rank, ranks), _META:
        chunks = build(
            model,
            vocabulary_size=vocabulary_size,
            sequence_length=model.positions or 2,
            dtype=torch.float32,
            topology=Topology.create(layout, device=_META),
            seed=0,
        )
        return sizes(local_parameters(chunks, last_stage_of_several=False))


@contextmanager
def _imagined(rank: int, ranks: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
