"""Bytes that a rank holds of weights and optimizer, as arithmetic on its parameters.

It stands beside what `Updater.held` counts over live tensors, kind by kind, and is tested to be equal to it, padding
included: ZeRO-1 and 2 cut each flat group of parameters into equal parts, ZeRO-3 each parameter. Activations are not in
here, nor is what a step takes besides while it runs: at ZeRO-1 and 2 once more the gradients of this rank's part, in
fp32. Imports without torch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.mechanism import Mechanism, Reduction

KINDS = ("weights", "masters", "moments", "gradients", "buffers")
"""`gradients` are the sums over micro-batches; `buffers` what communication and offload keep besides."""
HOST = "host_"
"""Prefix of what lies in the host's memory while the model is on an accelerator."""

_BUCKETS, _LARGEST_BUCKET, _SMALLEST_BUCKET = 8, 50_000_000, 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """One parameter of a rank, as far as memory goes; a rank's sizes stand in the order of its parameters."""

    elements: int
    is_matrix: bool
    """Matrices decay and others do not, so that ZeRO keeps them apart."""
    is_expert: bool


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


def bucket_elements(elements: int) -> int:
    """Elements of the buffers in which gradients travel, for a rank that holds so many.

    An eighth of them, so that the first leave while others are computed and the two buffers take no more than a quarter
    of the gradients; at most 200 MB in fp32. A parameter that is larger travels by itself.
    """
    return min(_LARGEST_BUCKET, max(_SMALLEST_BUCKET, math.ceil(elements / _BUCKETS)))


def predicted(
    sizes: Sequence[Size], *, mechanism: Mechanism, width: int, sharing: Sharing, offload: bool
) -> dict[str, int]:
    """Bytes by kind between two micro-batches, those on the host under `host_` names; `width` bytes a weight."""
    if mechanism.stage == 0:
        return _whole(sizes, width)
    if mechanism.stage == 3:
        return _parts_of_each(sizes, width, sharing, offload)
    return _parts_of_groups(sizes, mechanism, width, sharing, offload)


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
    """Parameters that ZeRO-1 and 2 flatten together and cut into equal parts."""

    padded: int
    part: int
    touched: int
    """Elements of all parameters of which a part lies in this rank's part."""


def _groups(sizes: Sequence[Size], sharing: Sharing) -> Iterator[_Group]:
    kinds = sorted({(size.is_expert, size.is_matrix) for size in sizes})
    for is_expert, is_matrix in kinds:
        ranks = sharing.expert_ranks if is_expert else sharing.ranks
        rank = sharing.expert_rank if is_expert else sharing.rank
        members = [size.elements for size in sizes if (size.is_expert, size.is_matrix) == (is_expert, is_matrix)]
        unit = 2 * ranks
        padded = math.ceil(sum(members) / unit) * unit
        touched = _touched(members, padded // ranks, ranks)
        yield _Group(padded=padded, part=padded // ranks, touched=max(touched) if rank is None else touched[rank])


def _touched(members: Sequence[int], part: int, ranks: int) -> list[int]:
    """For each rank, the elements of all members of which some lie in its part."""
    found, start = [0] * ranks, 0
    for elements in members:
        for rank in range(start // part, (start + elements - 1) // part + 1):
            found[rank] += elements
        start += elements
    return found
