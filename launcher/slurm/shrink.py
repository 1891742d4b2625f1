"""`slurm.shrink`: the nearest layout that fits the ranks that are left.

The order of samples does not know ranks, and any layout loads what any other saved, so a run may go on smaller with the
same global batches; the sums are taken in another order, so its losses are the same to rounding (1e-5), not to the bit.

Nearest: data parallelism gives way first, because it is derived and costs nothing else. Where not even one replica of
the model fits, the degrees that cut it (context, pipeline, tensor) get smaller, as little as possible, and tensor last:
it is what made a layer fit into a device. Whether the model then fits into memory is not known here.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from launcher.config import RunConfig
from launcher.layout_rules import divisors
from launcher.validate import check_training
from parallel.common.errors import ConfigError, UserError
from parallel.config import ParallelConfig


def in_fewer_ranks(config: RunConfig, ranks: int) -> RunConfig:
    """The configuration in the nearest layout that works on so many ranks; unchanged where its own does.

    Raises:
        ConfigError: its own problems, where they are not the number of ranks.
        UserError: no smaller layout works.
    """
    first: ConfigError | None = None
    for layout in _candidates(config.parallel):
        candidate = replace(config, parallel=layout)
        try:
            check_training(candidate, ranks=ranks)
            return candidate
        except ConfigError as error:
            first = first or error
    assert first is not None
    if any(not problem.key.startswith(("parallel.", "model.", "train.")) for problem in first.problems):
        raise first
    raise UserError(f"no smaller layout works on {ranks} ranks (slurm.shrink); as it stands: {first.problems[0]}")


def _candidates(layout: ParallelConfig) -> Iterator[ParallelConfig]:
    """Layouts of the same or smaller degrees, nearest first."""
    degrees = itertools.product(*map(divisors, (layout.tensor, layout.pipeline, layout.context, layout.expert)))

    def distance(candidate: tuple[int, ...]) -> tuple[float, ...]:
        tensor, pipeline, context, expert = candidate
        size = tensor * pipeline * context
        return (-size, layout.tensor / tensor, layout.expert / expert, layout.pipeline / pipeline)

    for tensor, pipeline, context, expert in sorted(degrees, key=distance):
        kept = pipeline == layout.pipeline
        yield replace(
            layout,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=expert,
            virtual_pipeline=layout.virtual_pipeline if kept else 1,
            pipeline_split=layout.pipeline_split if kept else None,
            sequence_parallel="auto" if tensor == 1 else layout.sequence_parallel,
        )
