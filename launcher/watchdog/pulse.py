"""The rank's side of the watchdog: it says what it does, and a monitor beside it sees when that lasts too long.

Heartbeats stay on the node, in memory shared with the monitor. What goes from node to node goes through the run's
directory, which all nodes write anyway, and only once somebody hangs: files there need no server that could hang or die
with the rank that holds it (the rendezvous' store lives in the first rank or its agent), and cost nothing in a run
that is well. Stacks are dumped by faulthandler from inside a signal's handler in C, whatever holds the interpreter.
"""

import faulthandler
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from launcher.start import repository_environment
from launcher.watchdog.beats import END, RENDEZVOUS, START, Beats
from launcher.watchdog.collectives import arrivals, newest
from launcher.watchdog.config import WatchdogConfig
from launcher.work import Ranks
from parallel.common.files import write_json

STACKS_SIGNAL = signal.SIGUSR2
"""What makes a rank dump the stacks of all its threads."""
_LONG = (RENDEZVOUS, START, "save", "evaluate")


class Steps(Protocol):
    """What a pulse asks of the run's progress."""

    step: int


class Pulse:
    """Says what this rank does; call it with the name of the phase that begins."""

    def __init__(self, config: WatchdogConfig, beats: Beats, attempt: str) -> None:
        self._limit, self._long = config.limit_seconds or math.inf, config.long_limit_seconds
        self._beats = beats
        self._number = 0
        self._attempt = attempt
        self._progress: Steps | None = None
        self._first = 0
        self(RENDEZVOUS)

    def met(self, attempt: str) -> None:
        """The ranks have met, and share the token of the attempt."""
        self._attempt = attempt
        self(START)

    def follow(self, progress: Steps) -> None:
        """Takes the number of the step from the run's progress, whose next step is the first of this attempt."""
        self._progress = progress
        self._first = progress.step + 1

    def __call__(self, phase: str) -> None:
        """A phase begins: data, forward_backward, collective, optimizer, save, evaluate."""
        self._number += 1
        step = 0 if self._progress is None else self._progress.step + 1
        long = phase in _LONG or step <= self._first
        limit = math.inf if math.isinf(self._limit) or phase == END else self._long if long else self._limit
        self._beats.write(number=self._number, step=step, phase=phase, limit_seconds=limit, attempt=self._attempt)


def _tell_operations(asked: int) -> None:
    """A thread's work: writes the flight recorder's records to the file whose name comes, until the monitor ends."""
    with os.fdopen(asked) as names:
        for name in names:
            found = arrivals()
            times = [[group, number, time_ns] for (group, number), time_ns in found.items()]
            write_json(Path(name.rstrip("\n")), {"newest": newest(found), "entered": times})


@contextmanager
def watched(config: WatchdogConfig, run: Path, ranks: Ranks) -> Iterator[Pulse]:
    """Watches this process inside the block, unless the configuration says that nothing is watched."""
    with tempfile.TemporaryFile() as beats, tempfile.TemporaryFile() as stacks:
        beats.truncate(Beats.size_bytes())
        pulse = Pulse(config, Beats(beats.fileno()), ranks.attempt)
        if config.limit_seconds is None:
            yield pulse
            return
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
        alive, mine = os.pipe()
        asked, ask = os.pipe()
        threading.Thread(target=_tell_operations, args=(asked,), daemon=True).start()
        words = [beats.fileno(), stacks.fileno(), alive, ask, os.getpid(), ranks.rank, ranks.world_size, run.absolute()]
        monitor = subprocess.Popen(
            [sys.executable, "-S", "-P", "-m", "launcher.watchdog.monitor", *map(str, words)],
            env=repository_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=(beats.fileno(), stacks.fileno(), alive, ask),
        )
        os.close(alive)
        os.close(ask)
        try:
            yield pulse
        finally:
            pulse(END)
            with suppress(ProcessLookupError):
                monitor.kill()
            monitor.wait()
            os.close(mine)
            faulthandler.unregister(STACKS_SIGNAL)
