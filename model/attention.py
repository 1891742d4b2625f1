"""Attention inside documents: rotary positions, then PyTorch's `scaled_dot_product_attention`, document by document.

The idea: a packed sequence holds several documents. Instead of a dense [sequence, sequence] mask, the flattened batch
is cut at the document borders and each piece is a causal attention of its own. No masked block is ever computed,
nothing of size sequence^2 is stored, and a document cannot see another by construction. Where every row is one
document, one batched call does it all.

The trade-off: one kernel launch a document. Rotary positions are applied here, not in megatron-core's attention,
because they restart at each document, so they differ from row to row.

What a layer needs beside its hidden states travels as `AttentionContext` in the slot that megatron-core passes,
untouched, from the model to each layer's core attention (`packed_seq_params`).
"""

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionContext:
    """What attention knows about the tokens of one micro-batch; made once a forward, shared by all layers."""

    cosine: Tensor
    """[sequence, batch, 1, head_size], of the model's dtype."""
    sine: Tensor
    """[sequence, batch, 1, head_size], of the model's dtype; the first half negated."""
    document_lengths: list[int] | None
    """Lengths of the documents of the flattened [batch, sequence]; None where each row is one document."""
    qkv_format: str = "sbhd"
    """Read by megatron-core: activations keep their [sequence, batch, head, head_size] shape."""


def document_lengths(document_ids: Tensor) -> list[int] | None:
    """Lengths of the documents of [batch, sequence] ids on the CPU, row after row; None where each row is one."""
    batch, sequence = document_ids.shape
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    borders = starts.flatten().nonzero().flatten()
    if len(borders) == batch:
        return None
    return torch.diff(borders, append=borders.new_tensor([batch * sequence])).tolist()


class RotaryTable(torch.nn.Module):
    """Cosines and sines of every position up to the sequence length, looked up by position.

    Source: Su et al., 2021, arXiv:2104.09864; the halves of a head rotate against each other, as in Llama.
    """

    table: Tensor

    def __init__(self, *, head_size: int, base: float, sequence_length: int, dtype: torch.dtype) -> None:
        super().__init__()
        exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
        angles = torch.arange(sequence_length, dtype=torch.float64)[:, None] * base**-exponents
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
    ) -> None:
        super().__init__(config=config)
        self.grouped = config.num_query_groups != config.num_attention_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: AttentionContext,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
    ) -> Tensor:
        """[sequence, batch, heads, head_size], fewer heads in key and value -> [sequence, batch, hidden]."""
        context = packed_seq_params
        query = rotate(query, context.cosine, context.sine)
        key = rotate(key, context.cosine, context.sine)
        if context.document_lengths is None:
            attended = self._attend(*(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)))
            return attended.permute(2, 0, 1, 3).flatten(2)
        sequence, batch = query.shape[:2]
        pieces = zip(
            *(tensor.transpose(0, 1).flatten(0, 1).split(context.document_lengths) for tensor in (query, key, value)),
            strict=True,
        )  # a document at a time: [length, heads, head_size] three times
        attended = [self._attend(*(piece.transpose(0, 1)[None] for piece in triple))[0] for triple in pieces]
        joined = torch.cat([piece.transpose(0, 1) for piece in attended])  # [batch * sequence, heads, head_size]
        return joined.view(batch, sequence, -1).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[batch, heads, length, head_size] -> the same shape, causal."""
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
