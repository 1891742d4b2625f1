"""Multi-head latent attention: queries, keys and values made of narrow latents, positions in channels of their own.

The idea (DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1): a token's hidden state is projected down to a latent, which
is normed and projected up to the keys and values of all heads. Channels that turn with the position cannot pass the
latent, so each key has a few beside it, the same for all heads. Here a head's turning channels come first, so that
the attention of every other model serves this one too.

Layouts: the projections down are whole on every tensor rank, those up are cut by heads. Under sequence parallelism each
rank projects its own tokens down, so those weights are read through an operation whose backward sums over the tensor
ranks, and the latents are gathered: kv_rank + rope_head_size channels a token, where whole keys and values would be
heads times as many. The trade-off: keys and values are made whole before attention; nothing is absorbed, as when
decoding from a cache of latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from model.attention import DocumentAttention
from model.config import ModelConfig
from model.layer_context import LayerContext

_EPS = 1e-6
"""Of the latents' norms, whatever that of the others is (as in `transformers`)."""


class _Down(torch.nn.Module):
    """A projection that every tensor rank has whole."""

    def __init__(self, config: TransformerConfig, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size, config.hidden_size, dtype=config.params_dtype))
        self.partial = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> [sequence, batch, size]."""
        return linear(hidden, copy_to_tensor_model_parallel_region(self.weight) if self.partial else self.weight)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Channels of a head."""

    turning: int
    still: int
    value: int


class LatentAttention(MegatronModule):
    """Attention of one layer, in the place of megatron-core's `SelfAttention`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        description: ModelConfig,
        norm: Callable[[TransformerConfig, int, float], torch.nn.Module],
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config)
        latent = description.latent
        assert latent.kv_rank is not None
        assert description.head_size is not None
        turning = latent.rope_head_size
        self.sizes = _Sizes(turning=turning, still=description.head_size - turning, value=latent.value_head_size)
        self.kv_rank, self.tensor_group = latent.kv_rank, pg_collection.tp
        options = {"config": config, "init_method": torch.nn.init.normal_, "bias": False, "tp_group": pg_collection.tp}
        up = partial(ColumnParallelLinear, gather_output=False, skip_bias_add=False, **options)
        queries = description.heads * description.head_size
        self.linear_q_down = self.q_norm = None
        if latent.q_rank is None:
            self.linear_q = up(config.hidden_size, queries)
        else:
            self.linear_q_down = _Down(config, latent.q_rank)
            self.q_norm = norm(config, latent.q_rank, _EPS)
            self.linear_q = up(latent.q_rank, queries)
        self.linear_kv_down = _Down(config, latent.kv_rank + turning)
        self.kv_norm = norm(config, latent.kv_rank, _EPS)
        self.linear_kv = up(latent.kv_rank, description.heads * (self.sizes.still + self.sizes.value))
        self.core_attention = DocumentAttention(
            config, layer_number, AttnMaskType.causal, "self", pg_collection=pg_collection, description=description
        )
        self.linear_proj = RowParallelLinear(
            description.heads * self.sizes.value,
            config.hidden_size,
            input_is_parallel=True,
            skip_bias_add=True,
            **options,
        )
        self.recomputed = config.recompute_granularity == "selective"

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, *, packed_seq_params: LayerContext, **_: Any
    ) -> tuple[Tensor, None]:
        """[sequence, batch, hidden] -> (the same shape, no bias)."""
        query, key, value = self._projected(hidden_states)
        attend = partial(self.core_attention, attention_mask=None, packed_seq_params=packed_seq_params)
        if self.recomputed and self.training:
            attended = tensor_parallel.checkpoint(attend, False, query, key, value)
        else:
            attended = attend(query, key, value)
        return self.linear_proj(attended)[0], None

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of this rank's heads, each [sequence, batch, heads, channels]."""
        latent = hidden if self.linear_q_down is None else self.linear_q_down(hidden)
        query = self._heads(self.linear_q(latent if self.q_norm is None else self.q_norm(latent))[0])
        latent, turning = self.linear_kv_down(hidden).split((self.kv_rank, self.sizes.turning), dim=-1)
        still, value = self._heads(
            self.linear_kv(self.kv_norm(latent))[0], size=self.sizes.still + self.sizes.value
        ).split((self.sizes.still, self.sizes.value), dim=-1)
        shared = self._for_all_heads(turning)[:, :, None].expand(*still.shape[:3], self.sizes.turning)
        return query, torch.cat((shared, still), dim=-1), value

    def _heads(self, tensor: Tensor, size: int | None = None) -> Tensor:
        return tensor.unflatten(-1, (-1, size or self.sizes.turning + self.sizes.still))

    def _for_all_heads(self, turning: Tensor) -> Tensor:
        """What this rank's heads share with those of the other tensor ranks, whose gradients add up."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(turning, group=self.tensor_group)
        return copy_to_tensor_model_parallel_region(turning, group=self.tensor_group)
