"""The table of ZeRO: each stage in each kind of pipeline, for a user's model on as many ranks.

A legal row says what `parallel.mechanism` decides, which is what the engine does, and the bytes that the fullest rank
holds, from the shapes of the user's own model. An illegal one says why; that it would need another batch is no reason.
Everything but `zero_stage` and the pipeline is as the user has it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from launcher.config import RunConfig
from launcher.explain.sizes import stage_sizes
from launcher.layout_rules import layout_problems
from parallel.config import ParallelConfig, Precision
from parallel.mechanism import Mechanism, mechanism
from parallel.memory import Sharing, Size, predicted

WIDTHS = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp16: 2}
"""Bytes of a weight; whatever else is held is fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One stage in one pipeline."""

    layout: ParallelConfig
    yours: bool
    mechanism: Mechanism | None
    """None where the layout is illegal."""
    refused: str | None
    bytes: Mapping[Precision, Mapping[str, int]]
    """Of the rank that holds most, by kind, between two micro-batches."""

    @property
    def pipeline(self) -> str:
        """The kind of pipeline in words."""
        stages, chunks = self.layout.pipeline, self.layout.virtual_pipeline
        if stages == 1:
            return "no pipeline"
        return f"{stages} stages" + (f" x {chunks} chunks" if chunks > 1 else "")


def rows(config: RunConfig, ranks: int, *, vocabulary_size: int) -> Iterator[Row]:
    """Every row, pipeline by pipeline; the configuration is complete and legal."""
    for layout in _pipelines(config.parallel):
        same = (layout.pipeline, layout.virtual_pipeline) == (
            config.parallel.pipeline,
            config.parallel.virtual_pipeline,
        )
        sizes: list[list[Size]] | None = None
        for stage in range(4):
            candidate = replace(layout, zero_stage=stage)
            yours = same and stage == config.parallel.zero_stage
            found = layout_problems(replace(config, parallel=candidate), ranks)
            problem = next((problem for problem in found if problem.key != "train.global_batch_size"), None)
            if problem is not None:
                yield Row(layout=candidate, yours=yours, mechanism=None, refused=str(problem), bytes={})
                continue
            if sizes is None:
                sizes = stage_sizes(
                    config.model, candidate, vocabulary_size=vocabulary_size, optimizer=config.optimizer
                )
            how = mechanism(
                candidate,
                tied=config.model.trains_tied_embeddings,
                sharers=ranks // (candidate.tensor * candidate.pipeline),
                optimizer=config.optimizer.name,
            )
            averaged = config.optimizer.average_decay is not None
            held = {
                precision: _fullest(sizes, how, width, candidate, ranks, averaged)
                for precision, width in WIDTHS.items()
            }
            yield Row(layout=candidate, yours=yours, mechanism=how, refused=None, bytes=held)


def _pipelines(layout: ParallelConfig) -> Iterator[ParallelConfig]:
    """Without a pipeline, with one, with an interleaved one: the user's degrees, else 2."""
    stages, chunks = max(2, layout.pipeline), max(2, layout.virtual_pipeline)
    for pipeline, virtual_pipeline in ((1, 1), (stages, 1), (stages, chunks)):
        same = pipeline * virtual_pipeline == layout.pipeline * layout.virtual_pipeline
        split = layout.pipeline_split if same else None
        yield replace(layout, pipeline=pipeline, virtual_pipeline=virtual_pipeline, pipeline_split=split)


def _fullest(
    sizes: list[list[Size]], how: Mechanism, width: int, layout: ParallelConfig, ranks: int, averaged: bool
) -> dict[str, int]:
    shared = ranks // (layout.tensor * layout.pipeline)
    sharing = Sharing(ranks=shared, expert_ranks=shared // layout.expert, tensor_ranks=layout.tensor)
    stages = [
        predicted(stage, mechanism=how, width=width, sharing=sharing, offload=layout.offload, averaged=averaged)
        for stage in sizes
    ]
    return max(stages, key=lambda held: sum(held.values()))
