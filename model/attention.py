"""Attention inside documents: rotary positions, then PyTorch's `scaled_dot_product_attention`, document by document.

The idea: a packed sequence holds several documents. Instead of a dense [sequence, sequence] mask, the flattened batch
is cut at the document borders and each piece is a causal attention of its own. No masked block is ever computed,
nothing of size sequence^2 is stored, and a document cannot see another by construction. Where every row is one
document, one batched call does it all.

Under context parallelism a rank holds two chunks of each row. Keys and values are gathered over the group; each chunk
of queries is cut at the document borders, and attends to its document up to the chunk's end.

The trade-off: one kernel launch a document. Rotary positions are applied here, not in megatron-core's attention,
because they restart at each document, so they differ from row to row.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from model.config import ModelConfig, RopeScalingConfig
from model.layer_context import LayerContext, Pieces
from parallel.context import ContextParallel


def find_pieces(document_ids: Tensor, chunks: Sequence[tuple[int, int]]) -> Pieces | None:
    """The pieces of [batch, sequence] ids on the CPU for the ranges of a row that a rank holds; None where each row is
    one document and one piece."""
    batch, sequence = document_ids.shape
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    borders = starts.flatten().nonzero().flatten().tolist()
    if len(borders) == batch and len(chunks) == 1:
        return None
    ends = [*borders[1:], batch * sequence]
    documents = [end - start for start, end in zip(borders, ends, strict=True)]
    if len(chunks) == 1:
        return Pieces(documents=documents, queries=[(length, index, length) for index, length in enumerate(documents)])
    queries: list[tuple[int, int, int]] = []
    for row in range(batch):
        for first, last in chunks:
            low, high = row * sequence + first, row * sequence + last
            index = bisect_right(borders, low) - 1
            while low < high:
                stop = min(high, ends[index])
                queries.append((stop - low, index, stop - borders[index]))
                low, index = stop, index + 1
    return Pieces(documents=documents, queries=queries)


def frequencies(*, head_size: int, base: float, scaling: RopeScalingConfig) -> Tensor:
    """Radians per position of each pair of channels, [head_size / 2] float64."""
    plain = base ** -(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    if scaling.factor == 1:
        return plain
    waves = scaling.original_positions * plain / (2 * math.pi)  # of each pair in the original length
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((waves - low) / (high - low)).clamp(0, 1)  # 1 for short waves, 0 for long ones
    return plain * (kept + (1 - kept) / scaling.factor)


class RotaryTable(torch.nn.Module):
    """Cosines and sines of every position up to the sequence length, looked up by position.

    Source: Su et al., 2021, arXiv:2104.09864; the halves of a head rotate against each other, as in Llama. The
    stretching of long waves: Grattafiori et al., 2024, arXiv:2407.21783.
    """

    table: Tensor

    def __init__(
        self,
        *,
        head_size: int,
        base: float,
        sequence_length: int,
        dtype: torch.dtype,
        scaling: RopeScalingConfig | None = None,
    ) -> None:
        super().__init__()
        radians = frequencies(head_size=head_size, base=base, scaling=scaling or RopeScalingConfig())
        angles = torch.arange(sequence_length, dtype=torch.float64)[:, None] * radians
        cosine, sine = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)))
        self.register_buffer("table", table.to(dtype), persistent=False)  # [2, sequence, head_size]

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [sequence, batch, 1, head_size] of positions [batch, sequence]."""
        cosine, sine = self.table[:, positions.T, None]
        return cosine, sine


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns [sequence, batch, heads, head_size] by the angles of its positions."""
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cosine, torch.cat((second, first), dim=-1), sine)


class DocumentAttention(MegatronModule):
    """Causal attention that never crosses a document border; megatron-core's `core_attention` slot."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        description: ModelConfig,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        group = pg_collection.cp
        self.context = ContextParallel(rank=group.rank(), size=group.size(), group=group)
        self.window = description.window(layer_number - 1)
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: LayerContext,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
    ) -> Tensor:
        """[sequence, batch, heads, head_size], fewer heads in key and value -> [sequence, batch, hidden]."""
        tokens = packed_seq_params
        if tokens.rotation is not None:
            query, key = rotate(query, *tokens.rotation), rotate(key, *tokens.rotation)
        if tokens.pieces is None:
            attended = self._attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
            return attended.permute(2, 0, 1, 3).flatten(2)
        if self.context.size > 1:
            key, value = self.context.gather(torch.stack((key, value), dim=1)).unbind(dim=1)
        return self._by_document(query, key, value, tokens.pieces)

    def _by_document(self, query: Tensor, key: Tensor, value: Tensor, pieces: Pieces) -> Tensor:
        """Queries of this rank, keys and values of whole rows, each [sequence, batch, heads, head_size]."""
        sequence, batch = query.shape[:2]
        keys, values = (tensor.transpose(0, 1).flatten(0, 1).split(pieces.documents) for tensor in (key, value))
        queries = query.transpose(0, 1).flatten(0, 1).split([length for length, _, _ in pieces.queries])
        attended = [
            self._attend(
                *(piece.transpose(0, 1)[None] for piece in (ours, keys[document][:seen], values[document][:seen]))
            )[0].transpose(0, 1)
            for ours, (_, document, seen) in zip(queries, pieces.queries, strict=True)
        ]  # each [length, heads, head_size]
        return torch.cat(attended).view(batch, sequence, -1).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, heads, length, head_size], keys of the same or a greater length that ends where the queries end."""
        length, seen = query.shape[2], key.shape[2]
        if length == seen and (self.window is None or seen <= self.window):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        if self.window is None or seen <= self.window:
            mask = causal_lower_right(length, seen)
        else:
            mask = _band(length, seen, self.window, query.device)
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=self.grouped)


def _band(length: int, seen: int, window: int, device: torch.device) -> Tensor:
    """Which of `seen` keys each of the last `length` tokens attends to: itself and the window - 1 before it."""
    back = torch.arange(seen - length, seen, device=device)[:, None] - torch.arange(seen, device=device)
    return (back >= 0) & (back < window)
