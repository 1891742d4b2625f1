"""Attention inside documents: rotary positions, then PyTorch's `scaled_dot_product_attention`, document by document.

The idea: a packed sequence holds several documents. Instead of a dense [sequence, sequence] mask, the flattened batch
is cut at the document borders and each piece is a causal attention of its own. No masked block is ever computed,
nothing of size sequence^2 is stored, and a document cannot see another by construction. Where every row is one
document, one batched call does it all.

Under context parallelism a rank holds two chunks of each row. Keys and values are gathered over the group; each chunk
of queries is cut at the document borders, and attends to its document up to the chunk's end.

On a CPU torch's kernel for bf16 and fp16 spends most of its time on conversions where heads are narrow; those are
attended to in fp32, which is nearer to the truth and takes half the time at 16 channels, 0.8 of it at 32 (and 1.1 at
64, which therefore stays).

The trade-off: one kernel launch a document. Rotary positions are applied here, not in megatron-core's attention,
because they restart at each document, so they differ from row to row.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from model.config import ModelConfig
from model.layer_context import Bias, LayerContext, Piece, Pieces
from model.rope import rotate, score_scale
from parallel.context import ContextParallel

_NARROW_CHANNELS = 32


def find_pieces(
    document_ids: Tensor, chunks: Sequence[tuple[int, int]], *, causal: bool = True, prefix: Tensor | None = None
) -> Pieces | None:
    """The pieces of [batch, sequence] ids on the CPU for the ranges of a row that a rank holds; None where each row is
    one document and one piece.

    Args:
        document_ids: rise within a row.
        chunks: half-open ranges of a row.
        causal: a token sees those before it; otherwise all of its document.
        prefix: bool [batch, sequence], true for some first tokens of each document, which see each other as well.
    """
    batch, sequence = document_ids.shape
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    borders = starts.flatten().nonzero().flatten().tolist()
    if len(borders) == batch and len(chunks) == 1 and prefix is None:
        return None
    ends = [*borders[1:], batch * sequence]
    documents = [end - start for start, end in zip(borders, ends, strict=True)]
    given = [0] * len(documents) if causal else documents  # first tokens that see each other
    if prefix is not None:
        given = [int(part.sum()) for part in prefix.flatten().split(documents)]
    queries: list[Piece] = []
    for row in range(batch):
        for first, last in chunks:
            low, high = row * sequence + first, row * sequence + last
            index = bisect_right(borders, low) - 1
            while low < high:
                begin, border = borders[index], borders[index] + given[index]
                stop = min(high, border if low < border else ends[index])
                seen = given[index] if low < border else stop - begin
                queries.append(Piece(stop - low, index, low - begin, seen, low >= border))
                low, index = stop, index + (stop == ends[index])
    return Pieces(documents=documents, queries=queries)


def find_crossings(document_ids: Tensor, key_document_ids: Tensor, chunks: Sequence[tuple[int, int]]) -> Pieces | None:
    """The pieces of [batch, sequence] ids whose keys are all tokens of the same id of the same row in another tensor,
    [batch, keys], on the CPU; each id must stand there. None where each row of both is one document and one piece."""
    if len(chunks) == 1 and not document_ids.any() and not key_document_ids.any():
        return None
    documents: list[int] = []
    queries: list[Piece] = []
    for row, key_row in zip(document_ids, key_document_ids, strict=True):
        ids, lengths = key_row.unique_consecutive(return_counts=True)
        places = {number: len(documents) + index for index, number in enumerate(ids.tolist())}
        documents += lengths.tolist()
        for first, last in chunks:
            own, counts = row[first:last].unique_consecutive(return_counts=True)
            for number, length in zip(own.tolist(), counts.tolist(), strict=True):
                queries.append(Piece(length, places[number], 0, documents[places[number]], False))
    return Pieces(documents=documents, queries=queries)


def in_fp32(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` of tensors in a two-byte format, computed in fp32 and rounded once."""
    if attn_mask is not None and attn_mask.dtype == query.dtype:
        attn_mask = attn_mask.float()
    wide = scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=attn_mask, **options)
    return wide.to(query.dtype)


class DocumentAttention(MegatronModule):
    """Attention that never crosses a document border, causal or not; megatron-core's `core_attention` slot."""

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
        self.causal = attn_mask_type is AttnMaskType.causal
        self.local = description.rope_local_base is not None and self.window is not None
        self.scale = score_scale(description)
        self.softcap = description.attention_softcap
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
        """[sequence, batch, heads, head_size], fewer heads in key and value -> [sequence, batch, heads x its size]."""
        tokens = packed_seq_params
        rotation = tokens.local_rotation if self.local else tokens.rotation
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if tokens.pieces is None:
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            whole = Piece(query.shape[2], 0, 0, key.shape[2], self.causal)
            attended = self._attend(query, key, value, whole, tokens.bias)
            return attended.permute(2, 0, 1, 3).flatten(2)
        if self.context.size > 1:
            sizes = (key.shape[-1], value.shape[-1])
            key, value = self.context.gather(torch.cat((key, value), dim=-1)).split(sizes, dim=-1)
        return self._by_document(query, key, value, tokens.pieces, tokens.bias)

    def _by_document(self, query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, bias: Bias | None) -> Tensor:
        """Queries of this rank, keys and values of whole rows, each [sequence, batch, heads, head_size]."""
        sequence, batch = query.shape[:2]
        keys, values = (tensor.transpose(0, 1).flatten(0, 1).split(pieces.documents) for tensor in (key, value))
        queries = query.transpose(0, 1).flatten(0, 1).split([piece.length for piece in pieces.queries])
        attended = []  # each [length, heads, head_size]
        for ours, piece in zip(queries, pieces.queries, strict=True):
            own, seen, found = (
                part.transpose(0, 1)[None]
                for part in (ours, keys[piece.document][: piece.keys], values[piece.document][: piece.keys])
            )
            attended.append(self._attend(own, seen, found, piece, bias)[0].transpose(0, 1))
        return torch.cat(attended).view(batch, sequence, -1).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, piece: Piece, bias: Bias | None) -> Tensor:
        """[batch, heads, length, head_size] and as many keys as the piece has."""
        length, seen = piece.length, piece.keys
        whole = self.window is None or seen <= self.window
        narrow = query.device.type == "cpu" and query.dtype.itemsize == 2 and query.shape[-1] <= _NARROW_CHANNELS
        kernel = in_fp32 if narrow else scaled_dot_product_attention
        attend = partial(kernel, query, key, value, scale=self.scale, enable_gqa=self.grouped)
        if bias is not None:
            added = bias(piece.start, length, seen).masked_fill(~_seen(piece, seen, query.device), -torch.inf)
            return attend(attn_mask=added[None])
        if self.softcap is not None:
            mask = _seen(piece, self.window or seen, query.device)
            return self._attend_capped(query, key, value, mask, self.softcap)
        if not whole:
            assert self.window is not None
            return attend(attn_mask=_seen(piece, self.window, query.device))
        if not piece.causal:
            return attend()
        return attend(is_causal=True) if length == seen else attend(attn_mask=causal_lower_right(length, seen))

    def _attend_capped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, cap: float) -> Tensor:
        """With scores that never pass the cap; no fused kernel has them, so [length, keys] scores of a document are
        held."""
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = cap * torch.tanh(query @ key.transpose(-1, -2) * (scale / cap))  # [batch, heads, length, keys]
        exact = torch.float64 if scores.dtype == torch.float64 else torch.float32
        return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=exact).to(value.dtype) @ value


def _seen(piece: Piece, window: int, device: torch.device) -> Tensor:
    """Which keys each query of a piece attends to, [length, keys]: itself and the window - 1 before it, and where it
    is not causal as many behind it."""
    places = torch.arange(piece.start, piece.start + piece.length, device=device)
    back = places[:, None] - torch.arange(piece.keys, device=device)
    return (back < window) & (back >= 0 if piece.causal else back > -window)
