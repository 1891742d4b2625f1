"""`--ranks N`: starts local ranks through torchrun, hands signals on, and turns their outcome into one exit code.

torchrun always exits with 1, whatever its workers said; so they write an outcome file and this starter reads it.
A signal goes to the workers themselves, past torchrun, which would kill them 30 s after a TERM and die of USR1.
Imports without torch: a stage that is finished must answer at once.
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher.lifetime import children, send
from launcher.outcome import Outcome
from launcher.work import ATTEMPT_VARIABLE, OUTCOME_VARIABLE, STARTER_VARIABLE
from parallel.common.errors import UserError

_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def start_ranks(arguments: Sequence[str], *, ranks: int) -> int:
    """Runs `bloomery ARGUMENTS` on N local ranks; returns what they report through a file.

    Raises:
        UserError: the ranks reported a mistake of the user; the sentence is theirs.
    """
    attempt = secrets.token_hex(8)
    command = [sys.executable, "-P", "-m", "launcher.agent", "--standalone", "--nproc-per-node", str(ranks)]
    with tempfile.TemporaryDirectory(prefix="bloomery-") as scratch:
        outcome = Path(scratch) / "outcome.json"
        process = subprocess.Popen(
            [*command, "-m", "launcher", *arguments],
            env=_environment(ranks, attempt, outcome),
            start_new_session=True,
        )
        with _signals_handed_on(process.pid) as seen:
            code = process.wait()
        reported = Outcome.read(outcome)
    if seen and (reported is None or reported.attempt != attempt):
        print(f"bloomery: stopped by {signal.Signals(seen[0]).name} before the first step; nothing was lost.")
        return 130 if seen[0] == signal.SIGINT else 75
    if reported is None or reported.attempt != attempt:
        print(f"bloomery: the ranks ended without a word (torchrun's exit code: {code}).", file=sys.stderr)
        return code if code == 2 else 1
    if reported.exit_code == 2:
        raise UserError(reported.message)
    return reported.exit_code


def available_ranks() -> int:
    """Accelerators that a `--ranks` call may use by default, else 1; counted without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return max(1, len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))


def repository_environment() -> dict[str, str]:
    """This environment, with this very code before any other of the same name, whatever directory it is called from."""
    root = str(Path(__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    paths = f"{root}{os.pathsep}{inherited}" if inherited else root
    return {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}


def _environment(ranks: int, attempt: str, outcome: Path) -> dict[str, str]:
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return {
        "OMP_NUM_THREADS": str(threads),
        **repository_environment(),
        STARTER_VARIABLE: str(os.getpid()),
        ATTEMPT_VARIABLE: attempt,
        OUTCOME_VARIABLE: str(outcome),
    }


@contextmanager
def _signals_handed_on(agent: int) -> Iterator[list[int]]:
    """Signals go to the workers, who save and stop; a second INT or TERM kills them. Yields what has come."""
    seen: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        again = number in seen and number in (signal.SIGINT, signal.SIGTERM)
        seen.append(number)
        workers = children(agent)
        for worker in workers:
            send(worker, signal.SIGKILL if again else number)
        if again or not workers:
            send(agent, signal.SIGKILL if again else signal.SIGTERM)

    handed_on = [number for number in _HANDED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hand_on) for number in handed_on}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
