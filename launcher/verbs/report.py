"""`bloomery report`: one HTML file with everything about a run, or several beside each other, from their files."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launcher.places import find_run
from launcher.report.page import comparison, page
from parallel.common.errors import UserError
from parallel.common.files import write_text


def main(arguments: Sequence[str]) -> int:
    """Parses `RUN... [--output FILE]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery report",
        description="One self-contained HTML file: curves, the corpus, the evaluation, samples, the configuration; of\n"
        "several runs the curves in the same figures, and what differs between their configurations.",
        epilog="examples:\n  bloomery report first\n  bloomery report first second --output compared.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, or a name under runs/")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where it goes (default: report.html in the first run)"
    )
    options = parser.parse_args(list(arguments))
    runs = [find_run(name) for name in options.runs]
    output = options.output or runs[0].path / "report.html"
    if not output.parent.is_dir():
        raise UserError(f"{output} cannot be written: the directory {output.parent} does not exist.")
    write_text(output, page(runs[0]) if len(runs) == 1 else comparison(runs))
    print(f"written to {output}")
    return 0
