"""`bloomery status`: where a run is, or all runs under runs/: what the run has written down, and what Slurm says.

The quick half, and all of it: it imports no torch.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher import config as configuration
from launcher.length import total_steps
from launcher.outcome import Outcome
from launcher.run_directory import Lock, RunDirectory
from launcher.slurm.queue import Job, find_job
from parallel.checkpoint.manifest import whole_steps
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.units import format_count, format_duration

_RECENT = 20
"""Logged steps over which the speed is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """One run."""

    run: str
    state: str
    """finished, running, waiting (in Slurm's queue), saved (to be gone on with), failed, new."""
    step: int
    total_steps: int | None
    saved_step: int | None
    job: str | None
    """Slurm's number, with its state and why it waits."""
    nodes: str
    attempts: int
    steps_lost: int
    """Taken, and taken again after a crash; in the grain of train.log_every_steps."""
    tokens_per_second: float | None
    seconds_to_go: float | None
    last_error: str | None


def main(arguments: Sequence[str]) -> int:
    """Parses `[RUN] [--json FILE]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery status",
        description="Where a run is; without RUN, all runs under runs/.",
        epilog="example: bloomery status my-run --json status.json",
    )
    parser.add_argument("run", nargs="?", help="a directory, or a name under runs/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it here too")
    options = parser.parse_args(list(arguments))
    found = [status(directory) for directory in _runs(options.run)]
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(found) if options.run is None else _page(found[0]), markup=False)
    if options.json is not None:
        write_json(options.json, [asdict(each) for each in found] if options.run is None else asdict(found[0]))
    return 0


def status(directory: RunDirectory) -> Status:
    """Reads a run; whoever trains it is not disturbed."""
    metrics, history, outcome = list(directory.metrics), list(directory.history), Outcome.read(directory.outcome)
    jobs = [line["job"] for line in directory.jobs]
    jobs += [attempt["job"]["slurm_job_id"] for attempt in history if "slurm_job_id" in attempt["job"]]
    job = find_job(jobs[-1]) if jobs else None
    total = None
    if directory.config.is_file():
        total = total_steps(configuration.load([directory.config]))
    step = metrics[-1]["step"] if metrics else 0
    state = _state(directory, outcome, job, attempts=[attempt["attempt"] for attempt in history])
    rates = [record["tokens_per_second"] for record in metrics[-_RECENT:]]
    rate = sum(rates) / len(rates) if rates else None
    left = None
    if rate and total is not None and state in ("running", "waiting", "saved"):
        left = (total - step) * metrics[-1]["tokens"] / step / rate
    return Status(
        run=str(directory.path),
        state=state,
        step=step,
        total_steps=total,
        saved_step=max(whole_steps(directory.checkpoints), default=None),
        job=_described(job, jobs),
        nodes=job.nodes if job is not None else "",
        attempts=len(history),
        steps_lost=sum(attempt.get("steps_lost", 0) for attempt in history),
        tokens_per_second=rate,
        seconds_to_go=left,
        last_error=_last_error(directory, outcome),
    )


def _runs(text: str | None) -> list[RunDirectory]:
    def known(path: Path) -> bool:
        return (path / "config.yaml").is_file() or (path / "logs" / "jobs.jsonl").is_file()

    if text is None:
        return [RunDirectory(path) for path in sorted(Path("runs").glob("*")) if known(path)]
    for candidate in (Path(text), Path("runs") / text):
        if known(candidate):
            return [RunDirectory(candidate)]
    raise UserError(f"{text} is not a run: expected a directory that train or submit has made, or a name under runs/.")


def _state(directory: RunDirectory, outcome: Outcome | None, job: Job | None, attempts: Sequence[str]) -> str:
    if Lock.held(directory.lock):
        return "running"
    if outcome is not None and outcome.exit_code == 0:
        return "finished"
    if job is not None and job.state in ("PENDING", "REQUEUED", "CONFIGURING"):
        return "waiting"
    if job is not None and job.state == "RUNNING":
        return "starting"
    if not attempts:
        return "new"
    ended = outcome is not None and outcome.attempt == attempts[-1]
    return "saved" if ended and outcome is not None and outcome.exit_code in (75, 130) else "failed"


def _last_error(directory: RunDirectory, outcome: Outcome | None) -> str | None:
    """The sentence of the last attempt that went wrong, as long as nothing better came after it."""
    if outcome is not None and outcome.exit_code not in (0, 75, 130):
        return outcome.message
    saves = [event for event in directory.events if event["event"] in ("saved", "not_saved")]
    return saves[-1].get("why") if saves else None


def _described(job: Job | None, jobs: Sequence[str]) -> str | None:
    if job is None:
        return f"{jobs[-1]} (Slurm does not know it any more)" if jobs else None
    why = f", {job.reason}" if job.reason != "None" else ""
    return f"{job.identity} ({job.state}{why}, restarted {job.restarts} times)"


def _speed(each: Status) -> str:
    return "-" if each.tokens_per_second is None else f"{format_count(each.tokens_per_second)} tokens/s"


def _left(each: Status) -> str:
    return "-" if each.seconds_to_go is None else format_duration(each.seconds_to_go)


def _table(found: Sequence[Status]) -> Any:
    if not found:
        return "There is no run under runs/."
    table = Table(box=None, pad_edge=False)
    for title in ("run", "state", "step", "job", "attempts", "lost", "speed", "to go", "last error"):
        table.add_column(title)
    for each in found:
        step = f"{each.step}/{each.total_steps if each.total_steps is not None else '?'}"
        job = (each.job or "-").partition(" ")[0]
        told = (each.last_error or "-").partition("\n")[0][:80]
        counts = (str(each.attempts), str(each.steps_lost))
        table.add_row(Path(each.run).name, each.state, step, job, *counts, _speed(each), _left(each), told)
    return table


def _page(each: Status) -> str:
    total = each.total_steps if each.total_steps is not None else "?"
    lines = {
        "run": each.run,
        "state": each.state,
        "step": f"{each.step} of {total}, {each.saved_step if each.saved_step is not None else 'none'} saved",
        "job": f"{each.job or '-'}{f' on {each.nodes}' if each.nodes else ''}",
        "attempts": f"{each.attempts}, {each.steps_lost} steps lost",
        "speed": f"{_speed(each)}, {_left(each)} to go",
        "last error": each.last_error or "-",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())
