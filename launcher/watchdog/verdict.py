"""Who hangs, from what the monitors of all ranks saw. Imports without torch.

All ranks stand still when one does, most of them in a collective operation. The culprit is, in this order: a process
that was stopped; one whose stack is not inside torch.distributed; one of which no word came, where all others wait; the
one that is least far, in steps or in collective operations. Where none of this tells the ranks apart the sentence says
so, and the stacks are there.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.watchdog.beats import RENDEZVOUS

_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
_ROOT = Path(__file__).resolve().parent.parent.parent
_ROOMS = tuple(f"{_ROOT / room}/" for room in ("launcher", "parallel", "model", "data_pipeline"))
_WAITING_FRAMES = 8
"""How far up the stack a call of torch.distributed counts as waiting: wrappers lie above it, whole steps far below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the monitor of one rank saw."""

    rank: int
    host: str
    process: int
    step: int
    phase: str
    seconds: float
    """How long it has been in the phase."""
    state: str
    """One letter of the operating system: R runs, S sleeps, D waits for a device or a disk, T is stopped."""
    where: str
    """`file:line in function`, the innermost place, then the innermost of our code; empty where no stack came."""
    waiting: bool
    """Whether the main thread is inside torch.distributed."""
    entered: Mapping[str, int]
    """{process group: number of the last collective operation entered}, where the rank could still tell."""

    @property
    def stopped(self) -> bool:
        """Whether a signal or a debugger stopped it."""
        return self.state in "Tt"


def read_stack(text: str) -> tuple[str, bool]:
    """Where the main thread is, and whether it waits for others, from what faulthandler wrote."""
    _, found, current = text.partition("Current thread")
    frames = list(_FRAME.finditer(current.partition("\n\n")[0] if found else ""))
    if not frames:
        return "", False
    ours = next((frame for frame in frames if frame["file"].startswith(_ROOMS)), frames[0])
    places = [f"{_short(frame['file'])}:{frame['line']} in {frame['name']}" for frame in (frames[0], ours)]
    waiting = any("/torch/distributed/" in frame["file"] for frame in frames[:_WAITING_FRAMES])
    return ", called at ".join(dict.fromkeys(places)), waiting


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the monitors make of it."""

    sentence: str
    """Names the culprit by rank and host, and says where it is."""
    host: str | None = None
    """Where all culprits are, if that is one host of several."""


def judge(reports: Sequence[Report], *, world_size: int, hosts: Mapping[int, str]) -> Finding:
    """Finds the culprit.

    Args:
        reports: of the ranks from which a word came, at least one.
        world_size: how many there are.
        hosts: {rank: host} as far as it is known.
    """
    if all(report.phase == RENDEZVOUS for report in reports):
        return Finding(sentence=_apart(reports, world_size))
    silent = sorted(set(range(world_size)) - {report.rank for report in reports})
    stopped = [report for report in reports if report.stopped]
    busy = [report for report in reports if not report.waiting]
    least = min((report.step for report in reports), default=0)
    everywhere = {report.host for report in reports} | {hosts[rank] for rank in silent if rank in hosts}

    def found(culprits: Sequence[Report], does: str) -> Finding:
        places = {report.host for report in culprits}
        host = places.pop() if len(places) == 1 and len(everywhere) > 1 else None
        return Finding(sentence=_told(culprits, does, reports, silent), host=host)

    if stopped:
        return found(stopped, "is stopped (by a signal or a debugger)")
    if len(busy) == len(reports) and silent and len(reports) > 1:
        busy = []
    if busy and len(busy) < len(reports):
        return found(busy, "hangs")
    if silent:
        names = ", ".join(f"rank {rank} on {hosts.get(rank, 'an unknown host')}" for rank in silent[:8])
        places = {hosts.get(rank) for rank in silent}
        return Finding(
            sentence=f"no word comes from {names}: a dead or frozen node; {_waiting(reports)}.",
            host=places.pop() if len(places) == 1 else None,
        )
    behind = [report for report in reports if report.step == least]
    if len(behind) == len(reports):
        behind = [report for report in reports if _behind(report, reports)] or behind
    if len(reports) == 1 or len(behind) < len(reports):
        return found(behind, "hangs")
    return Finding(sentence=f"all {world_size} ranks stand still and cannot be told apart; {_place(reports[0])}.")


def _behind(report: Report, reports: Sequence[Report]) -> bool:
    """Whether others have entered a collective operation that this rank has not, in a group that it is in."""
    return any(other.entered.get(group, 0) > number for other in reports for group, number in report.entered.items())


def _apart(reports: Sequence[Report], world_size: int) -> str:
    waiting = ", ".join(f"rank {report.rank} on {report.host}" for report in reports[:8])
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return f"the {world_size} ranks do not meet at {place}: {waiting} waited {reports[0].seconds:.0f} s for the others."


def _told(culprits: Sequence[Report], does: str, reports: Sequence[Report], silent: Sequence[int]) -> str:
    first, *others = sorted(culprits, key=lambda report: report.rank)
    named = {report.rank for report in culprits}
    rest = [report for report in reports if report.rank not in named]
    parts = [f"rank {first.rank} on {first.host} {does}: {_place(first)}"]
    if others:
        parts.append("so do " + ", ".join(f"rank {report.rank} on {report.host}" for report in others[:8]))
    if rest:
        parts.append(_waiting(rest))
    if silent:
        parts.append(f"no word from the ranks {', '.join(map(str, silent[:8]))}")
    return "; ".join(parts) + "."


def _place(report: Report) -> str:
    step = f"step {report.step}, " if report.step else ""
    place = f", at {report.where}" if report.where else ""
    return f"{step}{report.phase} for {report.seconds:.0f} s{place}"


def _waiting(reports: Sequence[Report]) -> str:
    return f"{len(reports)} other rank{'s wait' if len(reports) > 1 else ' waits'}"


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(_ROOT)) if file.startswith(_ROOMS) else "/".join(path.parts[-2:])
