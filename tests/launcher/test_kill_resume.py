"""Eight rounds of `benchmarks/kill_resume.py`: killed anywhere, a run ends with the bits of an undisturbed one."""

from pathlib import Path

import pytest

from benchmarks.kill_resume import POINTS, kill_runs

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.fault(
    number=3,
    fault="all ranks are killed eight times, at points of a save and at random, over several runs",
    holds="each start takes the newest whole checkpoint; the run ends with the bits of an undisturbed one",
    back_after=2.8,
)
def test_a_run_killed_again_and_again_is_the_same_run(tmp_path: Path) -> None:
    found = kill_runs(tmp_path, rounds=8, cases=("zero2-asynchronous",), seed=22)
    assert found.wrong == []
    assert found.rounds == 8
    assert found.runs >= 2
    assert sum(any(point in name for name in found.kills) for point in POINTS) >= 4, "at most points of a save"
    assert sum(count for step, count in found.resumed_from.items() if step) >= 4, "from a checkpoint"
