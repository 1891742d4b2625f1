"""`bloomery doctor`: what this machine and its installation can do, and what to mend, a line each.

The quick half, and all of it without `--job`: it imports no torch itself, so that a broken torch is a line too.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from launcher.doctor import machine, packages
from launcher.doctor.finding import Finding, Health, show
from launcher.start import start_ranks
from launcher.verbs.train import positive, ranks_to_start
from launcher.work import Work, from_environment
from parallel.common.files import write_json

_EPILOG = """\
examples:
  bloomery doctor                        this machine, this installation
  bloomery doctor --json report.json     the same for a program
  srun --nodes 8 python -m launcher doctor --job       all nodes of a job, compared with each other
  bloomery doctor --job --ranks 2        the same on this machine

Exit codes: 0 nothing has to be mended, 2 something has to (the lines marked BAD say how)."""


def main(arguments: Sequence[str]) -> int | Work:
    """Parses `[--job [--ranks N]] [--json FILE]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery doctor",
        description="Looks at this machine and its installation, or at the nodes of a job.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--job", action="store_true", help="compare the nodes of this job, as every run does")
    parser.add_argument("--ranks", type=positive, help="with --job: start this many local ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to this file")
    options = parser.parse_args(list(arguments))
    if options.job:
        ranks = from_environment()
        wanted = ranks_to_start(ranks, options.ranks)
        if wanted > ranks.world_size:
            return start_ranks(["doctor", *arguments], ranks=wanted)
        return Work(
            module="launcher.doctor.job", job=ranks, rank=ranks.rank, logs=Path(tempfile.mkdtemp(prefix="bloomery-"))
        )
    found: list[Finding] = []
    for finding in examined():
        show(finding)
        found.append(finding)
    if options.json is not None:
        write_json(options.json, [finding.record() for finding in found])
    return 2 if any(finding.health is Health.bad for finding in found) else 0


def examined() -> Iterator[Finding]:
    """All lines, the quick ones first."""
    yield from machine.python_and_kernel()
    yield from machine.room(Path.cwd())
    yield from machine.slurm()
    try:
        needs = packages.wanted()
    except PackageNotFoundError:
        text, remedy = "Bloomery's code is here, and it is not installed", "pip install . where its pyproject.toml is"
        yield Finding(about="packages", text=text, health=Health.bad, remedy=remedy)
        return
    probed = packages.probe(["torch", *sorted({need.module for need in needs} - {"torch"})])
    yield from packages.findings(needs, probed)
    yield from machine.accelerators(probed["torch"].get("sees"))
