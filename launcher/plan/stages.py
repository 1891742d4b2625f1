"""Which layers lie on which pipeline stage, and what parameters that makes. Imports without torch."""

from collections.abc import Sequence
from itertools import accumulate

from model.config import ModelConfig
from model.shapes import Shape, chunk_shapes
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.memory import Size


def chunk_layers(layers: int, layout: ParallelConfig) -> list[range]:
    """The layers of each pipeline chunk, in the model's order."""
    chunks = layout.pipeline * layout.virtual_pipeline
    split = layout.pipeline_split or [layers // chunks] * chunks
    return [range(end - length, end) for end, length in zip(accumulate(split), split, strict=True)]


def stage_chunks(layers: int, layout: ParallelConfig) -> list[Sequence[range]]:
    """The layers of each chunk of each pipeline stage."""
    chunks = chunk_layers(layers, layout)
    return [chunks[stage :: layout.pipeline] for stage in range(layout.pipeline)]


def balanced_split(layers: int, chunks: int) -> list[int] | None:
    """None where shares are equal; else the odd layers lie in the middle, for the ends also hold the embedding and the
    output layer."""
    if layers % chunks == 0 or chunks > layers:
        return None
    share, odd = divmod(layers, chunks)
    first = (chunks - odd) // 2
    return [share + (first <= index < first + odd) for index in range(chunks)]


def stage_shapes(
    model: ModelConfig,
    layout: ParallelConfig,
    *,
    vocabulary_size: int,
    optimizer: OptimizerConfig,
    sequence_length: int = 0,
    known: dict[Shape, Size] | None = None,
) -> list[list[Size]]:
    """The parameters of one rank of each pipeline stage; `known` keeps them over calls that differ in neither `tensor`
    nor the optimizer."""
    known = {} if known is None else known
    chunks = chunk_layers(model.layers, layout)
    return [
        [
            known.get(shape) or known.setdefault(shape, shape.size(layout.tensor, optimizer))
            for number in range(stage, len(chunks), layout.pipeline)
            for shape in chunk_shapes(
                model,
                chunks[number],
                vocabulary_size=vocabulary_size,
                expert=layout.expert,
                first=number == 0,
                last=number == len(chunks) - 1,
                sequence_length=sequence_length,
            )
        ]
        for stage in range(layout.pipeline)
    ]
