"""A rank's heartbeat: what it is doing and since when, in memory that its monitor reads.

The memory is a file without a name that both processes map, so that a beat costs a microsecond, and reading it needs
nothing of the rank: no thread, no lock, no interpreter. Times are of the system's monotonic clock, the same for all
processes of a machine. Only the standard library: the monitor starts in 15 ms.
"""

import mmap
import struct
import time
from dataclasses import dataclass

_LAYOUT = struct.Struct("=qqdd24s48s")
RENDEZVOUS, START, END = "rendezvous", "start", "end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """One reading."""

    number: int
    """Beats so far; two readings of the same number are the same beat."""
    step: int
    """The step that is being taken; 0 before the first."""
    phase: str
    """rendezvous, start, data, forward_backward, collective, optimizer, save, evaluate, end."""
    since: float
    """Seconds of the monotonic clock when the phase began."""
    limit_seconds: float
    """How long it may last; infinite where nothing is watched."""
    attempt: str
    """Token of the attempt; until the ranks have met, this rank's own, unless a starter gave them one."""


class Beats:
    """The mapped memory of one rank."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, _LAYOUT.size)

    @staticmethod
    def size_bytes() -> int:
        """Of the file behind the memory."""
        return _LAYOUT.size

    def write(self, *, number: int, step: int, phase: str, limit_seconds: float, attempt: str) -> None:
        """Says what the rank does from now on."""
        _LAYOUT.pack_into(
            self._memory, 0, number, step, time.monotonic(), limit_seconds, phase.encode(), attempt.encode()
        )

    def read(self) -> Beat:
        """What the rank does."""
        number, step, since, limit, phase, attempt = _LAYOUT.unpack_from(self._memory)
        return Beat(
            number=number,
            step=step,
            phase=_text(phase),
            since=since,
            limit_seconds=limit,
            attempt=_text(attempt),
        )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
