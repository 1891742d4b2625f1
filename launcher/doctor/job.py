"""`bloomery doctor --job`, and the same look at the start of each run: names nodes, and has a bad one left out."""

import logging
from collections.abc import Callable, Sequence

import torch.distributed as dist

from launcher.blame import Kind, blame
from launcher.doctor.finding import Finding, Health, show
from launcher.doctor.preflight import Measured, Suspect, measure, suspects
from launcher.outcome import Outcome
from launcher.runtime import device_of, in_ranks
from launcher.work import Ranks
from parallel.common.errors import UserError
from parallel.common.units import format_bytes

logger = logging.getLogger(__name__)


class BadNode(Exception):
    """The nodes of this job cannot train together; raised on all ranks."""


def preflight(ranks: Ranks, *, event: Callable[..., None] | None = None) -> tuple[list[Measured], list[Suspect]]:
    """Measures, notes who is to be left out, and says it; every rank calls this.

    Raises:
        BadNode: some node is bad.
    """
    measured = measure(device_of(ranks))
    found = suspects(measured)
    if dist.get_rank() == 0:
        for suspect in found:
            _blame(suspect, ranks)
            logger.warning("preflight: %s", suspect)
            if event is not None:
                event("preflight", step=0, node=suspect.node, why=suspect.why, bad=suspect.bad)
    if any(suspect.bad for suspect in found):
        raise BadNode("preflight: " + "; ".join(str(suspect) for suspect in found if suspect.bad))
    return measured, found


def work(job: Ranks) -> int:
    """The verb: prints a line a node; returns the exit code."""
    return in_ranks(_told, job)


def _told(ranks: Ranks) -> Outcome:
    measured = measure(device_of(ranks))
    found = suspects(measured)
    if ranks.rank == 0:
        for node in dict.fromkeys(each.node for each in measured):
            show(_line(node, [each for each in measured if each.node == node], found))
        for suspect in found:
            _blame(suspect, ranks)
    if any(suspect.bad for suspect in found):
        raise UserError("; ".join(str(suspect) for suspect in found if suspect.bad))
    return Outcome(attempt=ranks.attempt, exit_code=0, message="every node is well")


def _blame(suspect: Suspect, ranks: Ranks) -> None:
    kind = Kind.bad if suspect.bad else Kind.slow
    blame(suspect.node, f"preflight: {suspect}", attempt=ranks.attempt, kind=kind)


def _line(node: str, of_node: Sequence[Measured], found: Sequence[Suspect]) -> Finding:
    against = [suspect for suspect in found if suspect.node == node]
    times = {"computing": "seconds_computing", "all-reduce inside": "seconds_inside", "between": "seconds_between"}
    parts = [f"{len(of_node)} rank{'s' if len(of_node) > 1 else ''}"]
    for name, attribute in times.items():
        known = [seconds for each in of_node if (seconds := getattr(each, attribute)) is not None]
        parts += [f"{name} {1000 * min(known):.2g} ms"] if known else []
    if of_node[0].memory_bytes is not None:
        parts.append(f"{format_bytes(of_node[0].memory_bytes)} of memory left")
    health = Health.bad if any(suspect.bad for suspect in against) else Health.note if against else Health.ok
    return Finding(
        about=node, text=", ".join(parts), health=health, remedy="; ".join(suspect.why for suspect in against)
    )
