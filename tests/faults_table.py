"""docs/reliability.md: every fault that a test injects, written from the tests' own markers.

    @pytest.mark.fault(
        number=11,
        fault="a rank stops answering",
        holds="it is named, and the job ends to be requeued",
        back_after=4.2,
    )

`number` is one of the thirty below. `fault` says what the test does to a run, `holds` what must be so afterwards and is
asserted; `back_after` is how many seconds were measured on two CPU cores from the fault (or, where a person has to act,
from the same command on) until the run went on; or in words why there is no such time. The values are literals and the
marker stands on the test function (a test may have several), so that the table is made from the syntax trees, in a
moment, of tests that this machine cannot run too.

    python -m tests.faults_table      writes the page; exits with 1 where a fault has no test, or a test no time
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from parallel.common.units import format_duration

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
FAULTS = {
    1: "one rank is killed while it writes a shard",
    2: "rank 0 is killed at a point of the commit",
    3: "ranks are killed at random times",
    4: "a node loses power",
    5: "the time limit comes",
    6: "a save is slower than the grace",
    7: "the job is preempted",
    8: "the job is cancelled",
    9: "a second signal, a signal during a save, a signal before the first step",
    10: "one rank alone gets the signal",
    11: "a rank hangs",
    12: "a rank is slow",
    13: "two attempts believe that the run is theirs",
    14: "two jobs want one run directory",
    15: "the scheduler's daemons die",
    16: "the disk is full",
    17: "writes fail or are slow",
    18: "a checkpoint is damaged",
    19: "the newest checkpoint is gone or unreadable",
    20: "a crash while old checkpoints are removed",
    21: "the run goes on in another layout",
    22: "the run is stopped at an awkward place",
    23: "NaN, infinity, a spike",
    24: "silent corruption",
    25: "configuration, data or code changed between two attempts",
    26: "a crash that repeats",
    27: "the ranks cannot meet",
    28: "host memory is exhausted",
    29: "hostile files and values",
    30: "secrets",
}
_HEAD = """\
# What a run survives

Written by `make faults-table` from the markers of the tests; do not edit. Each row is a test that injects the fault
into a real run and holds what the third column says. "Back after" was measured with a tiny model on two CPU cores that
did much else (an upper bound), from the fault until the run went on; where a person has to act first, from the same
command on. Under `tests/slurm` the faults are done to jobs of a real Slurm of four nodes on this one machine; most of
that time is Slurm's own and Python's imports (docs/slurm.md).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One marker."""

    number: int
    fault: str
    holds: str
    back_after: float | str | None
    test: str
    """`tests/room/test_file.py::test_name`."""


def rows(directory: Path) -> list[Row]:
    """The markers of all test files below a directory, by number."""
    found = [row for path in sorted(directory.rglob("test_*.py")) for row in _of_file(path)]
    return sorted(found, key=lambda row: row.number)


def lacking(found: list[Row]) -> list[str]:
    """What the table lacks: faults without a test, tests without a time."""
    absent = sorted(FAULTS.keys() - {row.number for row in found})
    untimed = [row for row in found if row.back_after is None]
    return [
        *(f"no test carries fault {number}: {FAULTS[number]}" for number in absent),
        *(f"no time was measured for {row.test}" for row in untimed),
    ]


def page(found: list[Row]) -> str:
    """The page in Markdown."""
    lines = [_HEAD, "| # | fault | what holds | back after | test |", "| --- | --- | --- | --- | --- |"]
    for row in found:
        after = row.back_after if isinstance(row.back_after, str) else format_duration(row.back_after or 0.0)
        path, _, name = row.test.partition("::")
        lines.append(f"| {row.number} | {row.fault} | {row.holds} | {after} | [{name}](../{path}) |")
    return "\n".join(lines) + "\n"


def _of_file(path: Path) -> Iterator[Row]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                    assert not decorator.args, f"{path}::{node.name}: a fault's marker has names for all its values"
                    values = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in decorator.keywords}
                    assert values["number"] in FAULTS, f"{path}::{node.name}: there is no fault {values['number']}"
                    yield Row(**values, test=f"{path.relative_to(ROOT).as_posix()}::{node.name}")


if __name__ == "__main__":
    collected = rows(ROOT / "tests")
    PAGE.write_text(page(collected))
    print(f"{PAGE.relative_to(ROOT)}: {len(collected)} tests of {len(FAULTS)} faults")
    for sentence in lacking(collected):
        print(sentence, file=sys.stderr)
    sys.exit(bool(lacking(collected)))
