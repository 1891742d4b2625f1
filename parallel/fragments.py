"""What this rank holds of each parameter as rectangles of global tensors, which is what a checkpoint keeps of it.

ZeRO shards a parameter as a run of its flattened elements, wherever that begins and ends. A run of elements of a
matrix is at most three rectangles (the rest of a row, whole rows, the beginning of a row), of an n-dimensional array
at most 2n - 1. So every rank saves and loads its own part by itself, in its own memory: nothing is gathered, nothing
is copied, and the checkpoint knows global tensors alone.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from parallel.parameters import Fragment, LocalParameter
from parallel.updater import Fragmented

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape of a rectangle."""


class Held:
    """A checkpoint's participant: parts of global tensors in this rank's memory."""

    def __init__(self, pieces: Callable[[], Iterable[ShardedTensor]], *, loaded: Callable[[], None]) -> None:
        """`pieces` gives what this rank holds, live memory; `loaded` is called on all ranks after it was written to."""
        self._pieces = pieces
        self._loaded = loaded

    def state_dict(self) -> dict[str, ShardedTensor]:
        """The rectangles that this rank holds, by names unique on this rank; their data are the live memory."""
        return {f"{piece.key}@{','.join(map(str, piece.global_offset))}": piece for piece in self._pieces()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the rectangles that `state_dict` names, nothing to do where they are that very memory.

        All ranks call this together.
        """
        for name, piece in self.state_dict().items():
            assert piece.data is not None
            if state[name].data_ptr() != piece.data.data_ptr():
                piece.data.copy_(state[name])
        self._loaded()


def pieces_of_fragments(updater: Fragmented, local: LocalParameter, kind: str) -> Iterator[ShardedTensor]:
    """`Updater.pieces` of one that holds fragments."""
    for fragment in updater.fragments(local, kind):
        yield from cut(local, fragment, kind, shared=updater.sharers(local) is not None)


def observed_fragments(updater: Fragmented, local: LocalParameter, kind: str) -> list[tuple[ShardedTensor, Tensor]]:
    """`Updater.observed` of one that holds fragments."""
    whole = whole_value(updater, local, kind)
    return [(shard.description, shard.of(whole)) for shard in local.shards]


def whole_value(updater: Fragmented, local: LocalParameter, kind: str) -> Tensor:
    """What the optimizer holds of a whole local parameter, to the bit; every rank that shares it calls this."""
    fragments = updater.fragments(local, kind)
    group = updater.sharers(local)
    if group is None:
        (fragment,) = fragments
        return fragment.value.view(local.shape)
    value = torch.zeros(local.shape.numel(), dtype=torch.float32, device=local.parameter.device)
    for fragment in fragments:
        value[fragment.start : fragment.stop] = fragment.value
    # Bits, not numbers: -0.0 + 0.0 would be 0.0.
    dist.all_reduce(value.view(torch.int32), group=group)
    return value.view(local.shape)


def cut(local: LocalParameter, fragment: Fragment, kind: str, *, shared: bool) -> Iterator[ShardedTensor]:
    """The rectangles of global tensors that a fragment covers, in memory's order."""
    for shard in local.shards:
        described = shard.description
        length = math.prod(described.local_shape)
        start, stop = max(shard.start, fragment.start), min(shard.start + length, fragment.stop)
        position = start - fragment.start
        for offset, shape in rectangles(tuple(described.local_shape), start - shard.start, stop - shard.start):
            data = fragment.value.narrow(0, position, math.prod(shape)).view(shape)
            position += math.prod(shape)
            prepended = described.prepend_axis_num
            inner = zip(described.global_offset[prepended:], offset, strict=True)
            yield replace(
                described,
                key=f"{kind}.{described.key}",
                data=data,
                dtype=data.dtype,
                local_shape=shape,
                global_offset=(*described.global_offset[:prepended], *(sum(pair) for pair in inner)),
                axis_fragmentations=None,
                replica_id=_replica(described, shared=shared),
            )


def _replica(described: ShardedTensor, *, shared: bool) -> tuple[int, ...]:
    """Which copy this is, zeros for the one that is written; of what data-parallel ranks share there is one each."""
    assert isinstance(described.replica_id, tuple), described
    *others, data_parallel = described.replica_id
    return (*others, 0 if shared else data_parallel)


def rectangles(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Place]:
    """The elements from `start` to `stop` of a flattened row-major array, as rectangles in the order of memory."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    (first, begin), (last, end) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        yield from _in_row(first, shape, begin, end)
        return
    if begin:
        yield from _in_row(first, shape, begin, inner)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(last, shape, 0, end)


def _in_row(row: int, shape: tuple[int, ...], start: int, stop: int) -> Iterator[Place]:
    for offset, inner in rectangles(shape[1:], start, stop):
        yield (row, *offset), (1, *inner)
