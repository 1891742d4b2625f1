"""What a monitor becomes when its rank hangs: it writes down what it sees, hears the others, says who it was, ends it.

    run/logs/hang-ATTEMPT/rank-00003.json     what the monitor of rank 3 saw
                          rank-00003.txt      the stacks of all threads of rank 3
                          operations-00003.json   the collective operations that it entered, where it could still tell
                          verdict.txt         one sentence, by the monitor of the lowest rank that reported

`outcome.json` then says 75, to be requeued, with that sentence; after that each monitor kills its own rank. A file of
the run is written only where the run still is this attempt's.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from launcher.blame import Kind, blame, node_name
from launcher.outcome import Outcome
from launcher.run_directory import Lock, RunDirectory
from launcher.watchdog.beats import Beat, Beats
from launcher.watchdog.monitor import hang_directory
from launcher.watchdog.verdict import Report, judge, read_stack
from launcher.work import OUTCOME_VARIABLE
from parallel.common.files import write_json, write_text

REQUEUE = 75
_DUMP_SECONDS = 3.0
"""Longest wait for a stack; a stopped process dumps none."""
_TELL_SECONDS = 1.0
_FIRST_WORDS_SECONDS, _MOST_WORDS_SECONDS = 2.0, 30.0


def stacks(process: int, descriptor: int) -> str:
    """Makes a process dump its stacks into its file without a name, and reads them."""
    before = os.fstat(descriptor).st_size
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGUSR2)
    deadline, seen = time.monotonic() + _DUMP_SECONDS, -1
    while time.monotonic() < deadline:
        size = os.fstat(descriptor).st_size
        if size > before and size == seen:
            break
        seen = size
        time.sleep(0.1)
    return os.pread(descriptor, 1 << 20, before).decode(errors="replace")


def state_of(process: int) -> str:
    """The operating system's letter for what a process does; X if it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def entered(ask: int, path: Path) -> dict[str, int]:
    """Asks the rank for its collective operations; nothing where the interpreter is held, or no answer comes."""
    with suppress(OSError):
        os.write(ask, f"{path}\n".encode())
    deadline = time.monotonic() + _TELL_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return {}
        time.sleep(0.05)
    return json.loads(path.read_text())["newest"]


def observe(rank: int, process: int, beat: Beat, descriptor: int, ask: int, directory: Path) -> Report:
    """Writes this rank's files."""
    state = state_of(process)
    text = stacks(process, descriptor)
    where, waiting = read_stack(text)
    report = Report(
        rank=rank,
        host=node_name(),
        process=process,
        step=beat.step,
        phase=beat.phase,
        seconds=time.monotonic() - beat.since,
        state=state,
        where=where,
        waiting=waiting,
        entered=entered(ask, directory / f"operations-{rank:05d}.json"),
    )
    write_text(directory / f"rank-{rank:05d}.txt", text or f"no stack came; the process is in state {state}\n")
    write_json(directory / f"rank-{rank:05d}.json", asdict(report))
    return report


def heard(directory: Path, world_size: int, seconds: float) -> list[Report]:
    """The reports of all ranks, or those that came in time."""
    deadline = time.monotonic() + seconds
    while True:
        files = sorted(directory.glob("rank-*.json"))
        if len(files) == world_size or time.monotonic() > deadline:
            return [Report(**json.loads(file.read_text())) for file in files]
        time.sleep(0.1)


def conclude(run: RunDirectory, beat: Beat, directory: Path, said: str) -> None:
    """Says it, to the log, to the scheduler and to whoever started the ranks."""
    message = f"{said} The stacks of all ranks are in {directory}; the job ends to be requeued."
    print(f"bloomery: {message}", file=sys.stderr, flush=True)
    outcome = Outcome(attempt=beat.attempt, exit_code=REQUEUE, message=message, step=max(0, beat.step - 1))
    if OUTCOME_VARIABLE in os.environ:
        outcome.write(Path(os.environ[OUTCOME_VARIABLE]))
    if beat.attempt and Lock.attempt(run.lock) == beat.attempt:
        outcome.write(run.outcome)
        known = {"time": time.time(), "event": "hung", "attempt": beat.attempt, "step": beat.step}
        run.events.append({**known, "message": said})
    write_text(directory / "verdict.txt", message + "\n")


def main(arguments: list[str]) -> None:
    """See `launcher.watchdog.monitor` for the arguments."""
    beats_file, stacks_file, _, ask, process, rank, world_size = map(int, arguments[:7])
    run = RunDirectory(Path(arguments[7]))
    beat = Beats(beats_file).read()
    directory = Path(hang_directory(str(run.path), beat.attempt))
    words_seconds = min(_MOST_WORDS_SECONDS, max(_FIRST_WORDS_SECONDS, beat.limit_seconds / 4)) + _DUMP_SECONDS
    try:
        directory.mkdir(parents=True, exist_ok=True)
        observe(rank, process, beat, stacks_file, ask, directory)
        reports = heard(directory, world_size, words_seconds)
        if rank == reports[0].rank:
            found = judge(reports, world_size=world_size, hosts=run.hosts(beat.attempt))
            if found.host is not None:
                blame(found.host, found.sentence, attempt=beat.attempt, kind=Kind.hung)
            conclude(run, beat, directory, found.sentence)
        else:
            deadline = time.monotonic() + words_seconds
            while not (directory / "verdict.txt").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
