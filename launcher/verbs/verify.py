"""`bloomery verify`: reads and checks the layouts, shrinks them; `launcher.verify.work` proves them.

The quick half: it imports no torch. Everything runs on this machine's CPU, whatever accelerators it has.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.verbs.train import positive, split
from launcher.verify.matrix import Row, read_rows, row
from launcher.work import Work, from_environment
from parallel.common.errors import UserError

_EPILOG = """\
examples:
  bloomery verify my-run.yaml
  bloomery verify my-run.yaml parallel.tensor=4 --ranks 64 --json proof.json
  bloomery verify configs/quickstart.yaml --matrix tests/layouts.yaml --strict
  bloomery verify --matrix tests/families.yaml --strict

Exit codes: 0 proven, 1 a number is wrong (with --strict also: something was dropped), 2 the layout is illegal."""

ON_THE_CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Read when torch and DeepSpeed are imported; forked ranks must not inherit OpenMP's threads or a GPU's context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyJob:
    """Layouts to prove."""

    rows: Sequence[Row]
    is_list: bool
    """Whether they come from a list, which is shown a line a layout."""
    strict: bool
    certificate: Path | None
    scratch: tempfile.TemporaryDirectory
    """For what libraries say; gone with the process."""


def main(arguments: Sequence[str]) -> int | Work:
    """Parses `CONFIG... [key=value ...] [--ranks N] [--matrix FILE] [--json FILE] [--strict]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery verify",
        description="Trains a shrunken copy of your model in your layout on this machine's CPU, and compares loss, "
        "every gradient, the gradient norm, stepped weights and moments with one rank.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="*", help="YAML files, merged left to right, and key=value overrides")
    parser.add_argument("--ranks", type=positive, help="prove the layout of this many ranks (default: 2 data parallel)")
    parser.add_argument("--matrix", type=Path, metavar="FILE", help="prove each layout of a YAML list of rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the certificate here")
    parser.add_argument("--strict", action="store_true", help="accept no proof that had to drop something")
    options = parser.parse_intermixed_args(list(arguments))
    if from_environment().world_size > 1:
        raise UserError("bloomery verify starts its ranks itself: call it alone, not under torchrun or srun.")
    if options.matrix is None and not options.config:
        raise UserError("no configuration was given: bloomery verify my-run.yaml, or --matrix with a list of layouts.")
    if options.matrix is not None and options.ranks is not None:
        raise UserError("--ranks and --matrix were both given: each row of the list says its own `ranks`.")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise UserError(f"{options.json.resolve().parent} is not a directory: --json wants a file in one.")
    files, overrides = split(options.config)
    if options.matrix is not None:
        rows = read_rows(options.matrix, files, overrides)
    else:
        rows = [row("the layout", files, overrides, options.ranks)]
    os.environ.update(ON_THE_CPU)
    scratch = tempfile.TemporaryDirectory(prefix="bloomery-verify-")
    job = VerifyJob(
        rows=rows,
        is_list=options.matrix is not None,
        strict=options.strict,
        certificate=options.json,
        scratch=scratch,
    )
    return Work(module="launcher.verify.work", job=job, rank=0, logs=Path(scratch.name))
