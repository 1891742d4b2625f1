"""`bloomery explain`: the computing half. Builds the model without memory, then small copies of it in forked worlds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from launcher.config import RunConfig
from launcher.explain.collectives import collectives
from launcher.explain.explanation import Explanation, Measured
from launcher.explain.measured import bytes_held
from launcher.explain.rows import Row, rows
from launcher.explain.show import show
from launcher.explain.sizes import stage_sizes
from launcher.verbs.explain import ExplainJob
from launcher.verify.measure import Case
from launcher.verify.shrink import Shrunk, complete, shrink
from model.size import parameter_count
from parallel.common.errors import ConfigError
from parallel.common.files import write_json
from parallel.config import ParallelConfig, Precision

_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def work(job: ExplainJob) -> int:
    """Explains; returns 0, or 1 if what a small copy holds is not what was computed."""
    found = explain(job)
    show(found)
    if job.json is not None:
        write_json(job.json, found.as_dict())
    measured = [one for row in found.measured.values() for one in row] + [found.own_measured]
    return int(any(one is not None and one.computed != one.measured for one in measured))


def explain(job: ExplainJob) -> Explanation:
    """Everything about the job's layout."""
    config, ranks = job.config, job.ranks
    sizes = stage_sizes(config.model, config.parallel, vocabulary_size=job.vocabulary_size, optimizer=config.optimizer)
    found = Explanation(
        layout=in_words(config.parallel, ranks),
        ranks=ranks,
        precision=job.precision,
        parameters=parameter_count(config.model, job.vocabulary_size),
        rank_parameters=max(sum(size.elements for size in stage) for stage in sizes),
        rows=list(rows(config, ranks, vocabulary_size=job.vocabulary_size)),
    )
    if not job.measure:
        return found
    small = shrink(config, ranks)[0]
    case = Case(config=small.config, ranks=small.ranks, dtype=_DTYPES[job.precision])
    return replace(
        found,
        measured=_measured(config, found.rows),
        small=in_words(small.config.parallel, small.ranks),
        own_measured=_fullest(case, [job.precision])[0],
        collectives=collectives(case),
    )


def in_words(layout: ParallelConfig, ranks: int) -> str:
    """`8 ranks: tensor 2, data 4, ZeRO stage 1`; degrees of 1 are left out."""
    degrees = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual pipeline": layout.virtual_pipeline,
        "context": layout.context,
        "expert": layout.expert,
        "data": ranks // (layout.tensor * layout.pipeline * layout.context),
    }
    named = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    stage = f"ZeRO stage {layout.zero_stage}{' on the host' if layout.offload else ''}"
    return f"{ranks} rank{'s' if ranks > 1 else ''}: {', '.join([*named, stage])}"


def _measured(config: RunConfig, table: Sequence[Row]) -> Mapping[int, Sequence[Measured]]:
    found = {}
    for number, row in enumerate(table):
        small = None if row.mechanism is None else _small(config, row.layout)
        if small is not None:
            case = Case(config=small.config, ranks=small.ranks)
            found[number] = _fullest(case, [Precision.fp32, Precision.bf16])
    return found


def _small(config: RunConfig, layout: ParallelConfig) -> Shrunk | None:
    """A row of the table on two data-parallel ranks; None where the model cannot be cut so."""
    cut = ParallelConfig(
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        zero_stage=layout.zero_stage,
        offload=layout.offload,
    )
    try:
        return shrink(*complete(replace(config, parallel=cut), 2 * layout.pipeline))[0]
    except ConfigError:
        return None


def _fullest(case: Case, precisions: Sequence[Precision]) -> list[Measured]:
    by_rank = bytes_held(case, *(_DTYPES[precision] for precision in precisions))
    fullest = (
        max((held[number] for held in by_rank), key=lambda held: sum(held.measured.values()))
        for number in range(len(precisions))
    )
    return [
        Measured(precision=precision, computed=held.computed, measured=held.measured)
        for precision, held in zip(precisions, fullest, strict=True)
    ]
