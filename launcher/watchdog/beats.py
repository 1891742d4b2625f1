"""A rank's heartbeat: what it is doing and since when, in memory that its monitor reads.

The memory is a file without a name that both processes map, so that a beat costs a microsecond, and reading it needs
nothing of the rank: no thread, no lock, no interpreter. Times are of the system's monotonic clock, the same for all
processes of a machine. Only the standard library: the monitor starts in 15 ms.

Nothing makes writing and reading wait for each other, so a reader may meet a beat that is half written, with zeros for
its time and its limit, which would be a hang. So beats go into two places in turn, each with a checksum: one of them is
always whole, and the newest whole one counts.
"""

import mmap
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_LAYOUT = struct.Struct("=qqdd24s48s")
_CHECK = struct.Struct("=I")
_PLACE_BYTES = _LAYOUT.size + _CHECK.size
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
        self._memory = mmap.mmap(descriptor, self.size_bytes())

    @staticmethod
    def size_bytes() -> int:
        """Of the file behind the memory."""
        return 2 * _PLACE_BYTES

    def write(self, *, number: int, step: int, phase: str, limit_seconds: float, attempt: str) -> None:
        """Says what the rank does from now on; `number` rises by one from beat to beat."""
        content = _LAYOUT.pack(number, step, time.monotonic(), limit_seconds, phase.encode(), attempt.encode())
        first = number % 2 * _PLACE_BYTES
        self._memory[first : first + _PLACE_BYTES] = content + _CHECK.pack(zlib.crc32(content))

    def read(self) -> Beat:
        """What the rank does; it has written once at least."""
        found: list[tuple[Any, ...]] = []
        while not found:  # the rank cannot be writing both at once
            found = list(self._whole())
        number, step, since, limit, phase, attempt = max(found)
        return Beat(
            number=number,
            step=step,
            phase=_text(phase),
            since=since,
            limit_seconds=limit,
            attempt=_text(attempt),
        )

    def _whole(self) -> Iterator[tuple[Any, ...]]:
        """What stands in the places that are not being written."""
        for first in (0, _PLACE_BYTES):
            place = self._memory[first : first + _PLACE_BYTES]
            content, check = place[: _LAYOUT.size], place[_LAYOUT.size :]
            if _CHECK.unpack(check)[0] == zlib.crc32(content):
                yield _LAYOUT.unpack(content)


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
