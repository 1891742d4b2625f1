"""`bloomery checkpoint list | inspect | check | diff | prune`: looking at checkpoints and clearing them away.

The quick half: it imports no torch. `launcher.checkpoints` reads tensors, for `inspect` and `diff`.
"""

import argparse
import datetime
import json
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import config as configuration
from launcher.places import find_run, find_step
from launcher.run_directory import Lock, RunDirectory
from launcher.verbs.train import positive
from launcher.work import Work
from parallel.checkpoint.fence import claim
from parallel.checkpoint.integrity import problems
from parallel.checkpoint.manifest import MANIFEST, STATE, Manifest, step_directories, whole_manifests
from parallel.checkpoint.retention import Retention, prune
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.units import format_bytes, format_count
from parallel.config import BestMetric

_CHECKPOINT = "a step directory, a run (its newest step), or RUN@STEP"
_RUN = "a run's directory, or a name under runs/"


@dataclass(frozen=True, kw_only=True, slots=True)
class LookJob:
    """One checkpoint to be described, or two to be compared."""

    paths: tuple[Path, ...]
    """Step directories."""
    norms: bool
    """Whether every tensor is read."""
    output: Path | None
    """Where the answer goes as JSON, too."""


def list_main(arguments: Sequence[str]) -> int:
    """Parses `RUN [--json FILE]`."""
    parser = _parser("list", "The checkpoints of a run, and why each of them stays.", "list first")
    parser.add_argument("run", metavar="RUN", help=_RUN)
    _add_json(parser)
    options = parser.parse_args(list(arguments))
    run = find_run(options.run)
    retention = Retention.of(configuration.load([run.config]).checkpoint)
    whole = whole_manifests(run.checkpoints)
    reasons = retention.reasons(whole)
    found = [
        {**_facts(path, whole[path]), "stays": reasons[path]} if path in whole else {"name": path.name, "whole": False}
        for path in step_directories(run.checkpoints).values()
    ]
    if options.json is not None:
        write_json(options.json, found)
    if found:
        rows = [_row(row) if row["whole"] else (row["name"], *[""] * 5, "not whole") for row in found]
        print_table(("step", "tokens", "loss", "validation loss", "size", "saved", "stays"), rows, text=("stays",))
    else:
        print(f"{run.path} has no checkpoint.")
    return 0


def _facts(path: Path, manifest: Manifest) -> dict[str, Any]:
    progress = json.loads((path / STATE).read_bytes()).get("progress", {})
    return {
        "name": path.name,
        "whole": True,
        "step": manifest.step,
        "tokens": progress.get("tokens"),
        "metrics": manifest.metrics,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "saved": (path / MANIFEST).stat().st_mtime,
        "attempt": manifest.attempt,
        "layout": manifest.layout,
    }


def _row(facts: dict[str, Any]) -> tuple[str, ...]:
    losses = (facts["metrics"].get(name) for name in ("loss", "validation_loss"))
    return (
        str(facts["step"]),
        "" if facts["tokens"] is None else format_count(facts["tokens"]),
        *("" if loss is None else f"{loss:.4f}" for loss in losses),
        format_bytes(facts["bytes"]),
        f"{datetime.datetime.fromtimestamp(facts['saved']):%Y-%m-%d %H:%M}",
        ", ".join(facts["stays"]) or "until the next save",
    )


def check_main(arguments: Sequence[str]) -> int:
    """Parses `CHECKPOINT [--json FILE]`."""
    parser = _parser(
        "check",
        "Reads every file of a checkpoint and compares it with its hash. Exit code 1 if one is damaged.",
        "check first@1000",
    )
    parser.add_argument("checkpoint", help="a step directory, RUN@STEP, or a run: all of its steps")
    _add_json(parser)
    options = parser.parse_args(list(arguments))
    found = {str(path): _problems(path) for path in _steps_of(options.checkpoint)}
    if options.json is not None:
        write_json(options.json, found)
    for path, sentences in found.items():
        print("\n".join(sentences) if sentences else f"{path} is whole")
    return 1 if any(found.values()) else 0


def _steps_of(text: str) -> list[Path]:
    """The step directories that are meant, whole or not."""
    path = Path(text)
    if any((candidate / "config.yaml").is_file() for candidate in (path, Path("runs") / text)):
        run = find_run(text)
        steps = list(step_directories(run.checkpoints).values())
        if not steps:
            raise UserError(f"the run {run.path} has no checkpoint.")
        return steps
    return [path] if path.is_dir() else [find_step(text)]


def _problems(path: Path) -> list[str]:
    try:
        return list(problems(path, Manifest.read(path)))
    except UserError as error:
        return [str(error)]


def prune_main(arguments: Sequence[str]) -> int:
    """Parses `RUN [--keep N] [--keep-every-steps N] [--keep-best N] [--best-by METRIC] [--dry-run]`."""
    parser = _parser(
        "prune",
        "Removes the checkpoints that no rule keeps: the run's own rules, or those given here. The newest whole one "
        "always stays. What ended attempts left half-written goes too.",
        "prune first --keep 1 --keep-best 1",
    )
    parser.add_argument("run", metavar="RUN", help=_RUN)
    parser.add_argument("--keep", type=positive, metavar="N", help="newest checkpoints that stay")
    parser.add_argument("--keep-every-steps", type=positive, metavar="N", help="multiples of N stay")
    parser.add_argument("--keep-best", type=int, metavar="N", help="the N with the lowest metric stay")
    parser.add_argument("--best-by", choices=[*BestMetric], help="which metric")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    options = parser.parse_args(list(arguments))
    run = find_run(options.run)
    given = {"newest": options.keep, "every_steps": options.keep_every_steps, "best": options.keep_best}
    given["best_by"] = None if options.best_by is None else BestMetric(options.best_by)
    rules = Retention.of(configuration.load([run.config]).checkpoint)
    rules = rules.changed(**{name: value for name, value in given.items() if value is not None})
    Lock.check_free(run.lock)
    whole = whole_manifests(run.checkpoints)
    gone = {path: _facts(path, whole[path])["bytes"] for path, why in rules.reasons(whole).items() if not why}
    if not options.dry_run:
        _prune(run, rules)
    for path in gone:
        print(f"{'would remove' if options.dry_run else 'removed'} {path}")
    print(f"{len(gone)} of {len(whole)} checkpoints, {format_bytes(sum(gone.values()))}")
    return 0


def _prune(run: RunDirectory, rules: Retention) -> None:
    lock = Lock(run.lock)
    try:
        token = f"prune-{secrets.token_hex(8)}"
        lock.take(token)
        claim(run.checkpoints, token)
        prune(run.checkpoints, rules)
    finally:
        lock.close()


def inspect_main(arguments: Sequence[str]) -> Work:
    """Parses `CHECKPOINT [--no-norms] [--json FILE]`."""
    parser = _parser(
        "inspect",
        "What a checkpoint holds: layout, step, tokens, sizes, and names, shapes and norms of its tensors.",
        "inspect first@1000 --json facts.json",
    )
    parser.add_argument("checkpoint", help=_CHECKPOINT)
    parser.add_argument("--no-norms", dest="norms", action="store_false", help="read no tensor (quick)")
    _add_json(parser)
    options = parser.parse_args(list(arguments))
    return _look(LookJob(paths=(find_step(options.checkpoint),), norms=options.norms, output=options.json))


def diff_main(arguments: Sequence[str]) -> Work:
    """Parses `A B [--no-norms] [--json FILE]`."""
    parser = _parser(
        "diff",
        "What differs between two checkpoints: configuration, layout, progress, and every tensor, however it is cut.",
        "diff first@1000 second@1000",
    )
    parser.add_argument("a", metavar="A", help=_CHECKPOINT)
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--no-norms", dest="norms", action="store_false", help="compare names and shapes alone (quick)")
    _add_json(parser)
    options = parser.parse_args(list(arguments))
    paths = (find_step(options.a), find_step(options.b))
    return _look(LookJob(paths=paths, norms=options.norms, output=options.json))


def _look(job: LookJob) -> Work:
    first = job.paths[0].parent.parent
    logs = RunDirectory(first).logs if (first / "config.yaml").is_file() else Path(tempfile.mkdtemp(prefix="bloomery-"))
    return Work(module="launcher.checkpoints", job=job, rank=0, logs=logs)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[str]) -> None:
    """Columns as wide as what stands in them, numbers to the right, those named in `text` to the left."""
    widths = [max(len(row[number]) for row in (heads, *rows)) for number in range(len(heads))]
    for row in (heads, *rows):
        cells = zip(heads, row, widths, strict=True)
        laid_out = (cell.ljust(width) if head in text else cell.rjust(width) for head, cell, width in cells)
        print("  ".join(laid_out).rstrip())


def _parser(word: str, description: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"bloomery checkpoint {word}", description=description, epilog=f"example: bloomery checkpoint {example}"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answer here too")
