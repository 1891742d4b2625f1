"""The decision itself: what runs in which layout, and what is refused. That it is what happens is
tests/launcher/test_explain.py's to show."""

from dataclasses import replace

import pytest

from parallel.config import ParallelConfig
from parallel.mechanism import Reduction, mechanism, refusals

END, LAST, EVERY = Reduction.at_the_end, Reduction.in_last_backward, Reduction.in_every_backward


@pytest.mark.parametrize(
    ("layout", "tied", "stage", "reduction"),
    [
        (ParallelConfig(zero_stage=0), False, 0, END),
        (ParallelConfig(zero_stage=1), True, 1, LAST),
        (ParallelConfig(zero_stage=2), True, 2, EVERY),
        (ParallelConfig(zero_stage=3), True, 3, EVERY),
        (ParallelConfig(zero_stage=1, pipeline=2), False, 1, LAST),
        (ParallelConfig(zero_stage=2, pipeline=2), False, 2, EVERY),
        (ParallelConfig(zero_stage=1, pipeline=2), True, 1, END),
        (ParallelConfig(zero_stage=2, pipeline=2), True, 1, END),
        (ParallelConfig(zero_stage=1, pipeline=2, virtual_pipeline=2), False, 1, END),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_what_runs(layout: ParallelConfig, tied: bool, stage: int, reduction: Reduction, offload: bool) -> None:
    found = mechanism(replace(layout, offload=offload), tied=tied, sharers=2)
    assert (found.stage, found.reduction) == (stage, reduction)
    assert found.sharded == ("masters", "moments", "gradients", "weights")[: stage + 1 if stage else 0]
    assert ("saves what stage 1 saves" in found.reason) == (stage != layout.zero_stage)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_rank_shares_with_nobody(stage: int) -> None:
    alone = ParallelConfig(zero_stage=stage, pipeline=2 if stage < 3 else 1)
    assert mechanism(alone, tied=True, sharers=1).stage == 0
    assert mechanism(replace(alone, offload=True), tied=False, sharers=1).stage == stage, "ZeRO steps on the host"


@pytest.mark.parametrize(
    ("layout", "experts", "keys"),
    [
        (ParallelConfig(zero_stage=0), 8, []),
        (ParallelConfig(zero_stage=2, pipeline=2, offload=True), 8, []),
        (ParallelConfig(zero_stage=3, offload=True), 0, []),
        (ParallelConfig(zero_stage=3), 8, ["parallel.zero_stage"]),
        (ParallelConfig(zero_stage=3, pipeline=2), 0, ["parallel.zero_stage"]),
        (ParallelConfig(zero_stage=3, pipeline=2), 8, ["parallel.zero_stage", "parallel.zero_stage"]),
        (ParallelConfig(zero_stage=2, pipeline=2, virtual_pipeline=2), 0, ["parallel.zero_stage"]),
        (ParallelConfig(zero_stage=0, offload=True), 0, ["parallel.offload"]),
    ],
)
def test_what_is_refused(layout: ParallelConfig, experts: int, keys: list[str]) -> None:
    assert [problem.key for problem in refusals(layout, experts=experts)] == keys
