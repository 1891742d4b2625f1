"""The whole tensors of a live model on one rank, for who knows no layouts.

Each rank sends the rectangles that a checkpoint would have of it, one after the other, to the first rank, which puts
them together in its host's memory: the model once, whatever cut it, and one rectangle at a time on its device.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from parallel.checkpoint.agreement import exchange

_Described = tuple[str, tuple[int, ...], tuple[int | slice, ...], torch.Size, torch.dtype]
"""Name and shape of the whole, the place of the rectangle in it, its shape and dtype."""


@torch.no_grad()
def gathered(pieces: Iterable[ShardedTensor], device: torch.device) -> dict[str, Tensor]:
    """Global tensors by name on the first rank's CPU, nothing on the others; every rank calls this.

    Args:
        pieces: what this rank holds of them, live memory; of copies the first is taken.
        device: of this rank, over which they travel.
    """
    own = [(_described(piece), piece.data) for piece in pieces if not any(piece.replica_id)]  # pyright: ignore[reportArgumentType]
    everywhere = exchange([described for described, _ in own])
    if dist.get_rank():
        for _, data in own:
            assert data is not None
            dist.send(data.to(device).contiguous().view(-1).view(torch.uint8), dst=0)
        return {}
    whole: dict[str, Tensor] = {}
    for rank, held in enumerate(everywhere):
        for number, (name, shape, place, local_shape, dtype) in enumerate(held):
            data = own[number][1] if not rank else torch.empty(local_shape, dtype=dtype, device=device)
            assert data is not None
            if rank:
                dist.recv(data.view(-1).view(torch.uint8), src=rank)
            target = whole.setdefault(name, torch.empty(shape, dtype=dtype))
            target[place] = data.view(target[place].shape).cpu()
    return whole


def _described(piece: ShardedTensor) -> _Described:
    assert piece.data is not None
    axes = piece.prepend_axis_num
    inner = zip(piece.global_offset[axes:], piece.local_shape, strict=True)
    place = (*piece.global_offset[:axes], *(slice(start, start + length) for start, length in inner))
    return piece.key, tuple(piece.global_shape), place, piece.data.shape, piece.data.dtype
