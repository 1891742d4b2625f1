"""`bloomery report`: one HTML file with everything about a run, from the files that stand in it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launcher.places import find_run
from launcher.report.page import page
from parallel.common.errors import UserError
from parallel.common.files import write_text


def main(arguments: Sequence[str]) -> int:
    """Parses `RUN [--output FILE]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery report",
        description="One self-contained HTML file: curves, the corpus, the evaluation, samples, the configuration.",
        epilog="example: bloomery report first --output first.html",
    )
    parser.add_argument("run", metavar="RUN", help="a run's directory, or a name under runs/")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where it goes (default: report.html in the run)")
    options = parser.parse_args(list(arguments))
    run = find_run(options.run)
    output = options.output or run.path / "report.html"
    if not output.parent.is_dir():
        raise UserError(f"{output} cannot be written: the directory {output.parent} does not exist.")
    write_text(output, page(run))
    print(f"written to {output}")
    return 0
