"""Processes that end together: no rank outlives the command that started it. Linux only, elsewhere nothing happens."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1


def die_with_parent(parent: int) -> None:
    """Asks the kernel to kill this process when its parent dies; ends at once if `parent` is already gone."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Process ids of the direct children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after_name[1]) == parent:
            found.append(int(entry.name))
    return found


def send(process: int, number: int) -> None:
    """Sends a signal to a process that may already have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
