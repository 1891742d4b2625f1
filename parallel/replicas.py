"""What several ranks hold alike, compared bit by bit: silent corruption of one of them is found by its name.

Data-parallel ranks hold the same weights for the forward pass; tensor ranks hold the same norms and routers. A flipped
bit in one copy bends that rank's gradient and says nothing. So each rank adds up the bits of its weights, 8 bytes go
round, and only where they differ the ranks look closer. With three copies or more the majority is right. With two,
each is held against the masters that ZeRO keeps elsewhere, rounded as the forward pass reads them; stage 0 has none,
so both are named. ZeRO-3 keeps no copies over data-parallel ranks; its parts are compared over tensor ranks.

Frozen weights are looked at too, and more is at stake there: a flip in one stays for good, because nothing writes them
anew, and a checkpoint has whichever copy it takes. They have no masters; of two copies nobody can say which is wrong.

A sum of bits finds any single flip; two flips that cancel each other it does not. Every update of ZeRO-1 and 2 writes
the forward weights anew from the masters, so a flip lives for one step: this finds memory that keeps flipping, or a
rank whose arithmetic or network differs, and no master that went bad before it was sent round.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.checkpoint.agreement import exchange
from parallel.common.files import hash_bytes
from parallel.frozen import frozen_pieces
from parallel.parameters import LocalParameter
from parallel.updater import Kind, Updater

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True, slots=True)
class Odd:
    """Copies that differ."""

    parameter: str
    """Global name of the first that does."""
    ranks: tuple[int, ...]
    """Those that are wrong, or all that hold it where nobody can say which."""
    certain: bool
    """Whether it is known which are wrong."""


def compare(
    parameters: Sequence[LocalParameter],
    frozen: Sequence[LocalParameter],
    updater: Updater,
    group: ProcessGroup | None,
) -> Odd | None:
    """Looks once; every rank calls this, and all learn the same.

    Args:
        parameters: that this rank trains.
        frozen: that it holds besides.
        updater: which holds the masters.
        group: all ranks over the hosts.
    """
    pieces = [*_pieces(parameters, partial(updater.pieces, kind=Kind.weight)), *_pieces(frozen, frozen_pieces)]
    sums = torch.stack([value.view(_BITS[value.element_size()]).sum(dtype=torch.int64) for _, _, value in pieces])
    mine = dict(zip(((name, place) for name, place, _ in pieces), sums.tolist(), strict=True))
    if _alike(exchange(_summary((*parameters, *frozen), mine), group)):
        return None
    everywhere = exchange(mine, group)
    keys = sorted({key for rank in everywhere for key in rank})
    name, place = next(key for key in keys if len({rank[key] for rank in everywhere if key in rank}) > 1)
    holders = [rank for rank, found in enumerate(everywhere) if (name, place) in found]
    wrong = _against_masters(parameters, updater, name)
    counted = Counter(everywhere[rank][name, place] for rank in holders)
    (usual, most), *_ = counted.most_common()
    minority = tuple(rank for rank in holders if everywhere[rank][name, place] != usual)
    by_masters = tuple(rank for rank, is_wrong in enumerate(exchange(wrong, group)) if is_wrong)
    found = minority if 2 * most > len(holders) else by_masters
    return Odd(parameter=name, ranks=found or tuple(holders), certain=bool(found))


def _pieces(
    parameters: Sequence[LocalParameter], parts: Callable[[LocalParameter], Iterable[ShardedTensor]]
) -> Iterator[tuple[str, str, Tensor]]:
    """Name, place and content of what this rank holds for the forward pass, or of the `parts` that it has of it."""
    for local in parameters:
        shard = local.shards[0].description
        if _whole(local):
            place = f"{shard.global_offset}{' copy' if local.tied_copy else ''}"
            yield shard.key, place, local.parameter.detach().flatten()
        else:
            for piece in parts(local):
                assert piece.data is not None
                yield shard.key, str(piece.global_offset), piece.data.flatten()


def _whole(local: LocalParameter) -> bool:
    """Whether this rank holds all of its local parameter: stage 3 empties it."""
    return local.parameter.numel() == local.shape.numel()


def _summary(parameters: Sequence[LocalParameter], mine: dict[tuple[str, str], int]) -> dict[str, int]:
    """One number for all that tensor ranks cut, one for all that they share, by a hash of the names: few bytes."""
    shared = {local.shards[0].description.key for local in parameters if not local.cut_over_tensor_ranks}
    found = {}
    for is_shared in (False, True):
        keys = [key for key in sorted(mine) if (key[0] in shared) == is_shared]
        found[hash_bytes(repr(keys).encode())] = hash(tuple(mine[key] for key in keys))
    return found


def _alike(everywhere: Sequence[dict[str, int]]) -> bool:
    names = {name for rank in everywhere for name in rank}
    return all(len({rank[name] for rank in everywhere if name in rank}) == 1 for name in names)


def _against_masters(parameters: Sequence[LocalParameter], updater: Updater, name: str) -> bool:
    """Whether this rank's forward weights of this name change when they are written anew from the masters."""
    held = [local for local in parameters if local.shards[0].description.key == name and _whole(local)]
    before = [local.parameter.detach().clone() for local in held]
    updater.follow()
    return any(not torch.equal(old, local.parameter.detach()) for old, local in zip(before, held, strict=True))
