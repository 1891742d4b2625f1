"""Context parallelism: each rank of a group holds a part of every sequence.

The cut is balanced for causal attention (zigzag, as in ring attention): a sequence is cut into 2 x size chunks, and
rank r holds chunks r and 2 x size - 1 - r, an early one with little to attend to and a late one with much. Attention
itself gathers keys and values over the group (Grattafiori et al., 2024, arXiv:2407.21783, section 3.3.2); all else in a
layer looks at one token at a time and needs nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

CUT = ("tokens", "labels", "loss_weights", "positions", "segment_ids", "encoder_tokens")
"""The fields of a batch, [batch, sequence], of which a rank needs its own tokens only; the others stay whole."""
OF_ROWS = ("next_sentence_weights",)
"""Weights of what is said of a row as a whole, by its first token, [batch]: zero on the ranks that do not hold it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextParallel:
    """One rank's place in the cut of a sequence."""

    rank: int
    size: int
    group: ProcessGroup

    def chunks(self, sequence: int) -> list[tuple[int, int]]:
        """The half-open ranges of a sequence that this rank holds, in the order in which it holds them."""
        if self.size == 1:
            return [(0, sequence)]
        length = sequence // (2 * self.size)
        return [(index * length, (index + 1) * length) for index in (self.rank, 2 * self.size - 1 - self.rank)]

    def cut(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a batch: the fields of `CUT` become [batch, sequence / size]."""
        parts = {name: self.part(tensor) if name in CUT else tensor for name, tensor in batch.items()}
        if self.rank:
            parts |= {name: torch.zeros_like(parts[name]) for name in OF_ROWS if name in parts}
        return parts

    def part(self, tensor: Tensor) -> Tensor:
        """This rank's part of [..., sequence]."""
        if self.size == 1:
            return tensor
        return torch.cat([tensor[..., first:last] for first, last in self.chunks(tensor.shape[-1])], dim=-1)

    def gather(self, tensor: Tensor) -> Tensor:
        """[sequence / size, ...] of every rank -> [sequence, ...] in the order of the sequence; differentiable."""
        if self.size == 1:
            return tensor
        gathered = gather_from_sequence_parallel_region(tensor, group=self.group).chunk(2 * self.size)
        # Rank after rank: 0, last, 1, last but one ...; the even pieces ascend, the odd ones descend.
        return torch.cat([*gathered[0::2], *reversed(gathered[1::2])])
