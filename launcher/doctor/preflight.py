"""The nodes of a job, looked at before they compute: a bad one costs seconds here, and hours later.

Every rank measures, everybody hears everything, and each node is judged by the others' median, since nobody knows what
a machine of this kind should reach. What is looked at:

- a product of matrices, taken twice: a device that does not repeat itself, or is far slower than the others;
- the clock, against the others', right after all have met;
- memory and disk of the node that are left;
- the time of an all-reduce among the ranks of a node, and of one between neighbouring nodes. Each node has two
  neighbours and counts by the better one, so that a bad node does not speak against the good one next to it;
- versions and code: the same on all nodes.

A node is `bad`, which ends the attempt and leaves it out of the next one, or `slow`, which is said and counts as half
that. Costs some 0.2 s under gloo on two ranks; every rank has to come here.
"""

import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from launcher import changes
from launcher.blame import node_name
from launcher.doctor.machine import memory_available
from parallel.checkpoint.agreement import exchange
from parallel.common.faults import fault_point
from parallel.common.units import format_bytes

_SIDE = 256
"""Of the matrices; on an accelerator eight times that."""
_MESSAGE_BYTES = 4 << 20
"""On an accelerator eight times that, too."""
_ROUNDS = 3
_SLOWER = 3.0
"""A node that takes so many times the median's time is slow."""
_LEAST_SECONDS = 0.05
"""What takes less is not told from noise."""
_CLOCK_SECONDS = 5.0
_LEAST_MEMORY_BYTES = 256 << 20
_LEAST_DISK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """By one rank."""

    node: str
    seconds_computing: float
    repeats: bool
    """Whether its device gave the same product twice."""
    clock: float
    """Seconds since the epoch, when all had met."""
    memory_bytes: int | None
    disk_bytes: int
    """Left where temporary files go."""
    seconds_inside: float | None
    """An all-reduce among the ranks of the node; None for a rank alone on its node."""
    seconds_between: float | None
    """The same with a neighbouring node, the better of two; None where there is one node, or another rank measured."""
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspect:
    """A node that is not as the others are."""

    node: str
    why: str
    bad: bool
    """Else it is only slow."""

    def __str__(self) -> str:
        return f"{self.node} {self.why}"


def measure(device: torch.device) -> list[Measured]:
    """What all ranks have measured, in their order; every rank calls this."""
    fault_point("preflight")
    nodes = exchange(node_name())
    seconds, repeats = _compute(device)
    inside, between = _all_reduces(nodes, device)
    dist.barrier()
    clock = time.time()
    own = Measured(
        node=node_name(),
        seconds_computing=seconds,
        repeats=repeats,
        clock=clock,
        memory_bytes=memory_available(),
        disk_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        seconds_inside=inside,
        seconds_between=between,
        versions={**changes.versions(), "code": changes.code_hash(changes.code_files())},
    )
    return [Measured(**record) for record in exchange(asdict(own))]


def suspects(measured: Sequence[Measured]) -> list[Suspect]:
    """Nodes that are bad, or slow, by what the others have measured."""
    found = [
        *_wrong_arithmetic(measured),
        *_out_of_step(measured),
        *_without_room(measured),
        *_slow(measured, "computes", lambda each: each.seconds_computing),
        *_slow(measured, "takes for an all-reduce among its own ranks", lambda each: each.seconds_inside),
        *_slow(measured, "takes for an all-reduce with its neighbours", lambda each: each.seconds_between),
    ]
    return sorted(set(found), key=lambda suspect: (not suspect.bad, suspect.node))


def _compute(device: torch.device) -> tuple[float, bool]:
    """The shortest time of a product of matrices, and whether it came out the same each time."""
    side = _SIDE * (1 if device.type == "cpu" else 8)
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(side, side, generator=generator).to(device) for _ in range(2))
    products, times = [], []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        products.append((left @ right).sum(dim=1).cpu())
        times.append(time.perf_counter() - started)
    same = all(torch.equal(product, products[0]) for product in products) and bool(products[0].isfinite().all())
    return min(times), same


def _all_reduces(nodes: Sequence[str], device: torch.device) -> tuple[float | None, float | None]:
    """Seconds inside of this rank's node, and with the better of its neighbours."""
    ranks = {node: [rank for rank, there in enumerate(nodes) if there == node] for node in dict.fromkeys(nodes)}
    places = list(ranks)
    firsts = [ranks[node][0] for node in places]
    pairs = len(places) if len(places) > 2 else len(places) - 1
    neighbours = [(place, (place + 1) % len(places)) for place in range(pairs)]
    inside = _timed([members for members in ranks.values() if len(members) > 1], device)
    # Neighbours do not overlap within a round; an odd ring leaves one pair over.
    rounds = [neighbours[0::2], neighbours[1::2]]
    if len(places) % 2 and len(places) > 1:
        rounds = [neighbours[0:-1:2], neighbours[1:-1:2], neighbours[-1:]]
    times = [_timed([[firsts[one], firsts[other]] for one, other in pairs], device) for pairs in rounds if pairs]
    known = [seconds for seconds in times if seconds is not None]
    return inside, min(known, default=None)


def _timed(groups: Sequence[list[int]], device: torch.device) -> float | None:
    """The shortest all-reduce in the group that this rank is in, if it is in one; all groups at once."""
    mine: ProcessGroup | None = None
    made = [dist.new_group(sorted(ranks)) for ranks in groups]
    for ranks, group in zip(groups, made, strict=True):
        mine = group if dist.get_rank() in ranks else mine  # type: ignore[assignment]
    message = torch.zeros(_MESSAGE_BYTES * (1 if device.type == "cpu" else 8) // 4, device=device)
    times = []
    for _ in range(_ROUNDS if mine is not None else 0):
        dist.barrier(mine)
        started = time.perf_counter()
        dist.all_reduce(message, group=mine)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    dist.barrier()
    for group in made:
        if group is not None and group is mine:
            dist.destroy_process_group(group)  # type: ignore[arg-type]
    return min(times, default=None)


def _wrong_arithmetic(measured: Sequence[Measured]) -> list[Suspect]:
    why = "does not compute the same product twice"
    return [Suspect(node=each.node, why=why, bad=True) for each in measured if not each.repeats]


def _out_of_step(measured: Sequence[Measured]) -> list[Suspect]:
    """Other versions than most nodes have, or another time of day."""
    found = []
    for name in sorted({name for each in measured for name in each.versions}):
        by_node = {each.node: each.versions.get(name, "none") for each in measured}
        (usual, times), *others = Counter(by_node.values()).most_common()
        if others and others[0][1] == times:
            why = f"differs in {name}, and nobody can tell who is right: {', '.join(sorted(by_node.values()))}"
            found += [Suspect(node=node, why=why, bad=True) for node in by_node]
            continue
        found += [
            Suspect(node=node, why=f"has {name} {version}, the others {usual}", bad=True)
            for node, version in by_node.items()
            if version != usual
        ]
    middle = statistics.median(each.clock for each in measured)
    found += [
        Suspect(node=each.node, why=f"has a clock that is {each.clock - middle:+.0f} s off", bad=False)
        for each in measured
        if abs(each.clock - middle) > _CLOCK_SECONDS
    ]
    return found


def _without_room(measured: Sequence[Measured]) -> list[Suspect]:
    return [
        Suspect(node=each.node, why=f"has {format_bytes(left)} of {what} left", bad=True)
        for each in measured
        for what, left, least in (
            ("memory", each.memory_bytes, _LEAST_MEMORY_BYTES),
            ("disk for temporary files", each.disk_bytes, _LEAST_DISK_BYTES),
        )
        if left is not None and left < least
    ]


def _slow(measured: Sequence[Measured], what: str, seconds_of: Callable[[Measured], Any]) -> list[Suspect]:
    """Nodes whose best rank takes far longer than the median node's best rank; of two nodes nobody knows which."""
    by_node: dict[str, float] = {}
    for each in measured:
        seconds = seconds_of(each)
        if seconds is not None:
            by_node[each.node] = min(seconds, by_node.get(each.node, seconds))
    if len(by_node) < 3:
        return []
    usual = statistics.median(by_node.values())
    return [
        Suspect(node=node, why=f"{what} {seconds:.2g} s, the median is {usual:.2g} s", bad=False)
        for node, seconds in by_node.items()
        if seconds > max(_SLOWER * usual, _LEAST_SECONDS)
    ]
