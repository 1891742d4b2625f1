"""Bytes that a rank holds of weights and optimizer, as arithmetic on its parameters.

It stands beside what `Updater.held` counts over live tensors, kind by kind, and is tested to be equal to it, padding
included: ZeRO-1 cuts each bucket of parameters into equal parts, ZeRO-2 each flat group, ZeRO-3 each parameter; an
optimizer of whole parameters deals them out to owners. Activations are not in here, nor is what a step takes besides
while it runs: DeepSpeed's ZeRO-1 and 2 once more the gradients of this rank's part, in fp32. Imports without torch.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.mechanism import Mechanism, Reduction

KINDS = ("weights", "masters", "moments", "gradients", "buffers", "averages")
"""`gradients` are the sums over micro-batches; `buffers` what communication and offload keep besides; `averages` the
average of the weights, where a run keeps one."""
HOST = "host_"
"""Prefix of what lies in the host's memory while the model is on an accelerator."""

_ALIGNMENT = 8
_WORTH_A_CALL = 1_000_000
"""Elements below which a bucket saves nothing: gloo takes 0.4 ms for a collective however small it is, 4 ms for so
many."""
_BUCKETS, _LARGEST_BUCKET, _SMALLEST_BUCKET = 8, 50_000_000, 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One parameter of a rank, as far as memory goes; a rank's sizes stand in the order of its parameters."""

    elements: int
    group: str
    """What is stepped alike (matrices decay and others do not, for one) is what ZeRO flattens together."""
    is_expert: bool
    is_frozen: bool = False
    """Whether it has a weight and nothing else."""
    whole_elements: int = 0
    """Before tensor ranks cut it."""
    state_elements: int = 0
    """Words of 4 bytes that the optimizer keeps of the whole of it beside the master."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """How many ranks share, and which of them is meant."""

    ranks: int
    """Those that hold the same parameters: data x context."""
    expert_ranks: int
    """Those that hold the same experts: data x context / expert."""
    rank: int | None = None
    """Which of the first; by default the one that holds most."""
    expert_rank: int | None = None
    tensor_ranks: int = 1
    """Those that hold the parts of one matrix."""
    tensor_rank: int | None = None


def bucket_elements(elements: int) -> int:
    """Elements of the buffers in which gradients travel, for a rank that holds so many.

    An eighth of them, so that the first leave while others are computed and the two buffers take no more than a quarter
    of the gradients; at most 200 MB in fp32. A parameter that is larger travels by itself.
    """
    return min(_LARGEST_BUCKET, max(_SMALLEST_BUCKET, math.ceil(elements / _BUCKETS)))


def in_buckets(elements: Sequence[int], *, total: int) -> list[list[int]]:
    """Parameters that are stepped alike, by number, in the buckets of our own ZeRO-1: the last ones first, since their
    gradients come first. `total` are the elements of all parameters of the rank."""
    found: list[list[int]] = []
    room = 0
    for number in reversed(range(len(elements))):
        if elements[number] > room:
            found.append([])
            room = max(bucket_elements(total), _WORTH_A_CALL)
        found[-1].append(number)
        room -= elements[number]
    return found


def padded(elements: int, ranks: int) -> int:
    """Elements of a bucket that ranks share equally, each beginning at a multiple of 16 bytes."""
    return math.ceil(elements / (_ALIGNMENT * ranks)) * _ALIGNMENT * ranks


def predicted(
    sizes: Sequence[Size], *, mechanism: Mechanism, width: int, sharing: Sharing, offload: bool, averaged: bool = False
) -> dict[str, int]:
    """Bytes by kind between two micro-batches, those on the host under `host_` names; `width` bytes a weight.

    `averaged` says whether an average of the weights is kept.
    """
    trained = [size for size in sizes if not size.is_frozen]
    if mechanism.whole_parameters:
        found = _owned(trained, mechanism, width, sharing)
    elif mechanism.stage == 0:
        found = _whole(trained, width)
    elif mechanism.own:
        found = _parts_of_buckets(trained, width, sharing)
    elif mechanism.stage == 3:
        found = _parts_of_each(trained, width, sharing, offload)
    else:
        found = _parts_of_groups(trained, mechanism, width, sharing, offload)
    for size in sizes:
        if size.is_frozen:
            ranks = sharing.ranks if mechanism.stage == 3 else 1
            found["weights"] += width * math.ceil(size.elements / ranks)
    if averaged:
        frozen = [size for size in sizes if size.is_frozen]
        own = 4 * _averaged(trained, mechanism, sharing)
        found["averages"] = 4 * _shares(frozen, sharing if mechanism.stage == 3 else None)
        place = f"{HOST}averages" if offload else "averages"
        found[place] = found.get(place, 0) + own
    return found


def _averaged(sizes: Sequence[Size], mechanism: Mechanism, sharing: Sharing) -> int:
    """Elements of masters that a rank holds, the padding that evens out the ranks' parts left out."""
    if mechanism.whole_parameters:
        return _of_the_fullest(sizes, mechanism, sharing, state=False)
    if mechanism.stage == 0:
        return _shares(sizes, None)
    if mechanism.stage == 3:
        return _shares(sizes, sharing)
    total = 0
    for group in _buckets(sizes, sharing) if mechanism.own else _groups(sizes, sharing):
        rank = group.rank or 0
        total += max(0, min(group.part, group.elements - rank * group.part))
    return total


def _shares(sizes: Sequence[Size], sharing: Sharing | None) -> int:
    """Elements of parameters that are each cut into equal shares; all of them where `sharing` is None."""
    if sharing is None:
        return sum(size.elements for size in sizes)
    total = 0
    for size in sizes:
        share = math.ceil(size.elements / sharing.ranks)
        total += max(0, min(share, size.elements - (sharing.rank or 0) * share))
    return total


def owners(elements: Sequence[int], ranks: int) -> list[int]:
    """Who steps each of some parameters, of so many elements: the largest first, to whoever has least."""
    found, loads = [0] * len(elements), [(0, rank) for rank in range(ranks)]  # the second is a heap as it stands
    for number in sorted(range(len(elements)), key=lambda number: (-elements[number], number)):
        load, found[number] = loads[0]
        heapq.heapreplace(loads, (load + elements[number], found[number]))
    return found


def _owned(sizes: Sequence[Size], mechanism: Mechanism, width: int, sharing: Sharing) -> dict[str, int]:
    """Masters and state of the parameters that a rank owns; weights and gradients of all."""
    total = sum(size.elements for size in sizes)
    masters, moments = (_of_the_fullest(sizes, mechanism, sharing, state=state) for state in (False, True))
    return _kinds(weights=width * total, masters=4 * masters, moments=4 * moments, gradients=4 * total)


def _of_the_fullest(sizes: Sequence[Size], mechanism: Mechanism, sharing: Sharing, *, state: bool) -> int:
    total = 0
    for is_expert in (False, True):
        members = [size for size in sizes if size.is_expert == is_expert]
        data = (sharing.expert_ranks if is_expert else sharing.ranks) if mechanism.stage else 1
        held = [0] * (data * sharing.tensor_ranks)
        for size, owner in zip(members, owners([size.whole_elements for size in members], len(held)), strict=True):
            held[owner] += size.state_elements if state else size.whole_elements
        rank = sharing.expert_rank if is_expert else sharing.rank
        if rank is None or sharing.tensor_rank is None:
            total += max(held)
        else:
            total += held[(rank if mechanism.stage else 0) * sharing.tensor_ranks + sharing.tensor_rank]
    return total


def _whole(sizes: Sequence[Size], width: int) -> dict[str, int]:
    total = sum(size.elements for size in sizes)
    masters = 0 if width == 4 else 4 * total
    return _kinds(weights=width * total, masters=masters, moments=8 * total, gradients=4 * total)


def _parts_of_each(sizes: Sequence[Size], width: int, sharing: Sharing, offload: bool) -> dict[str, int]:
    own = sum(math.ceil(size.elements / sharing.ranks) for size in sizes)
    buffers = 4 * bucket_elements(sum(size.elements for size in sizes))
    if offload:  # the gradient that is stepped on has memory of its own there
        return _kinds(weights=width * own, buffers=buffers, **_on_host(own, gradients=8 * own))
    return _kinds(weights=width * own, buffers=buffers, masters=4 * own, moments=8 * own, gradients=4 * own)


def _parts_of_buckets(sizes: Sequence[Size], width: int, sharing: Sharing) -> dict[str, int]:
    found = list(_buckets(sizes, sharing))
    all_of_them, own = sum(bucket.padded for bucket in found), sum(bucket.part for bucket in found)
    return _kinds(weights=width * all_of_them, masters=4 * own, moments=8 * own, gradients=4 * all_of_them)


def _parts_of_groups(
    sizes: Sequence[Size], mechanism: Mechanism, width: int, sharing: Sharing, offload: bool
) -> dict[str, int]:
    groups = list(_groups(sizes, sharing))
    total, own = sum(size.elements for size in sizes), sum(group.part for group in groups)
    weights = width * sum(group.padded for group in groups)
    early = mechanism.stage == 1 and mechanism.reduction is Reduction.in_last_backward
    buffers = 8 * bucket_elements(total) if early else 0
    # Stage 2 sums up exactly its part where sums are not weights' format; else all of a parameter that it touches.
    exact = width < 4
    part = own if exact else sum(group.touched for group in groups)
    gradients = 4 * (total if mechanism.stage == 1 else part)
    if not offload:
        return _kinds(weights=weights, buffers=buffers, masters=4 * own, moments=8 * own, gradients=gradients)
    moved = mechanism.stage == 2 and not exact
    largest = width * max(size.elements for size in sizes)
    return _kinds(
        weights=weights,
        gradients=0 if moved else gradients,
        buffers=buffers + largest,
        **_on_host(own, gradients=4 * own + (gradients if moved else 0)),
        host_buffers=width * own + largest,
    )


def _on_host(own: int, *, gradients: int) -> dict[str, int]:
    return {"host_masters": 4 * own, "host_moments": 8 * own, "host_gradients": gradients}


def _kinds(**found: int) -> dict[str, int]:
    return dict.fromkeys(KINDS, 0) | found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """Parameters that lie one behind another and are cut into equal parts."""

    elements: int
    padded: int
    part: int
    rank: int | None
    """Which part is meant."""
    touched: int
    """Elements of all parameters of which a part lies in this rank's part."""


def _alike(sizes: Sequence[Size], sharing: Sharing) -> Iterator[tuple[list[int], int, int | None]]:
    """Elements of the parameters that are stepped alike, and the ranks that share them, and which is meant."""
    for is_expert, group in sorted({(size.is_expert, size.group) for size in sizes}):
        members = [size.elements for size in sizes if (size.is_expert, size.group) == (is_expert, group)]
        if is_expert:
            yield members, sharing.expert_ranks, sharing.expert_rank
        else:
            yield members, sharing.ranks, sharing.rank


def _groups(sizes: Sequence[Size], sharing: Sharing) -> Iterator[_Group]:
    """As DeepSpeed flattens them at ZeRO-1 and 2."""
    for members, ranks, rank in _alike(sizes, sharing):
        unit = 2 * ranks
        filled = math.ceil(sum(members) / unit) * unit
        touched = _touched(members, filled // ranks, ranks)
        yield _Group(
            elements=sum(members),
            padded=filled,
            part=filled // ranks,
            rank=rank,
            touched=max(touched) if rank is None else touched[rank],
        )


def _buckets(sizes: Sequence[Size], sharing: Sharing) -> Iterator[_Group]:
    """As our own ZeRO-1 lays them."""
    total = sum(size.elements for size in sizes)
    for members, ranks, rank in _alike(sizes, sharing):
        for numbers in in_buckets(members, total=total):
            elements = sum(members[number] for number in numbers)
            filled = padded(elements, ranks)
            yield _Group(elements=elements, padded=filled, part=filled // ranks, rank=rank, touched=elements)


def _touched(members: Sequence[int], part: int, ranks: int) -> list[int]:
    """For each rank, the elements of all members of which some lie in its part."""
    found, start = [0] * ranks, 0
    for elements in members:
        for rank in range(start // part, (start + elements - 1) // part + 1):
            found[rank] += elements
        start += elements
    return found
