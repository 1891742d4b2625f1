"""The process beside each rank that sees when it hangs: only the standard library, some 8 MB, awake once a second.

It is a process of its own because a rank that hangs cannot be asked: a C call may hold the interpreter, a signal may
have stopped it. It reads the rank's heartbeat. A beat older than its limit is a hang, and this process becomes
`launcher.watchdog.report`. So does that of every other rank that waits: it looks for the directory that the first one
makes, from half the limit on. Nothing else goes from node to node, and nothing at all while the run is well.

    python -S -P -m launcher.watchdog.monitor BEATS STACKS ALIVE ASK PROCESS RANK WORLD_SIZE DIRECTORY

BEATS and STACKS are inherited descriptors of the rank's files without a name, ALIVE one of a pipe that ends with it,
ASK one of a pipe from which a thread of the rank takes the name of a file to write its collective operations to.
"""

import os
import select
import signal
import sys
import time

from launcher.watchdog.beats import Beat, Beats

_LONGEST_TICK_SECONDS = 1.0


def hang_directory(run: str, attempt: str) -> str:
    """Where the monitors of an attempt put what they know."""
    return os.path.join(run, "logs", f"hang-{attempt}")


def lateness(beat: Beat, frozen_seconds: float) -> float:
    """Seconds that a rank has been in its phase, without those in which this machine stood still altogether."""
    return time.monotonic() - beat.since - frozen_seconds


def watch(beats: Beats, alive: int, process: int, run: str) -> bool:
    """Returns when the rank has ended (False) or hangs (True)."""
    number, frozen_seconds = -1, 0.0
    while True:
        beat = beats.read()
        if beat.number != number:
            number, frozen_seconds = beat.number, 0.0
        late = lateness(beat, frozen_seconds)
        if late > beat.limit_seconds:
            return True
        if late > beat.limit_seconds / 2 and os.path.isdir(hang_directory(run, beat.attempt)):
            return True
        tick = min(_LONGEST_TICK_SECONDS, max(0.05, beat.limit_seconds / 8))
        before = time.monotonic()
        if select.select([alive], [], [], tick)[0] or os.getppid() != process:
            return False
        # Asleep for much longer than asked: not the rank hangs, the whole node was suspended.
        overslept = time.monotonic() - before - tick
        if overslept > 2 * _LONGEST_TICK_SECONDS:
            frozen_seconds += overslept


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are the rank's; this process ends with it
    beats_file, _, alive_pipe, _, rank_process = map(int, sys.argv[1:6])
    if watch(Beats(beats_file), alive_pipe, rank_process, sys.argv[8]):
        os.execv(sys.executable, [sys.executable, "-P", "-m", "launcher.watchdog.report", *sys.argv[1:]])
