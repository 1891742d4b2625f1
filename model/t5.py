"""An encoder and a decoder, or one pipeline stage of them: a decoder tells the spans that its encoder does not see.

Source: Raffel et al., 2019, arXiv:1910.10683. The idea: both stacks are one, over one stream of hidden states,

    [encoder's tokens, then decoder's tokens; batch, hidden]

of which an encoder block changes the first part and hands the second on, and a decoder block changes the second and
attends to the first. So the schedule, sequence and context parallelism and recomputation that all models have work on
it as they are, and the embedding that both stacks share stands on the first stage. megatron-core's `T5Model` is not
used: its schedules no longer carry two tensors (in 0.19 `decoder_seq_length` of the 1F1B schedule replaces the other
length), so that it has no pipeline, and its masks are dense.

The trade-off: the encoder's stage hands the decoder's embedded tokens on, a fifth more to send. Each stack has one
table of relative positions for all its layers, so each stack stands on one stage: two stages at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from model.attention import DocumentAttention, find_crossings, find_pieces
from model.config import ModelConfig
from model.cross_entropy import TokenLosses
from model.dropout import Residual, token_keys
from model.language_model import LanguageModel
from model.layer_context import LayerContext
from model.norms import norm
from model.relative import RelativeBias
from model.specs import Block, TransformerStack, block, mlp
from parallel.config import ParallelConfig
from parallel.topology import Topology

_ENCODER, _DECODER = hybrid_block.LayerSymbols.ATTENTION, hybrid_block.LayerSymbols.MOE
"""Two symbols of megatron-core's pattern; either of its slots takes any layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Streams:
    """What the layers know of the tokens of both stacks."""

    encoder: LayerContext
    decoder: LayerContext
    crossing: LayerContext
    """Of the decoder's queries and the encoder's keys."""
    length: int
    """Rows of this rank's hidden states that are the encoder's."""
    qkv_format: str = "sbhd"
    """Read by megatron-core."""


class EncoderBlock(Block):
    """Changes the encoder's part; the last one norms it."""

    def __init__(self, config: TransformerConfig, submodules: Any, *, last: int, **options: Any) -> None:
        super().__init__(config, submodules, **options)
        self.final_norm = None
        if self.layer_number == last:
            self.final_norm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor, *arguments: Any, packed_seq_params: Any, **options: Any) -> Any:
        """[both, batch, hidden] -> (the same shape, None)."""
        streams: Streams = packed_seq_params
        ours, others = hidden_states.tensor_split([streams.length])
        found, _ = super().forward(ours, *arguments, packed_seq_params=streams.encoder, **options)
        return torch.cat((found if self.final_norm is None else self.final_norm(found), others)), None


class CrossingAttention(DocumentAttention):
    """From the decoder's tokens to those of the encoder's document that they belong to."""

    tokens: LayerContext
    """Handed over by the block: megatron-core's cross attention has no argument for it."""

    def forward(self, *arguments: Any, packed_seq_params: None = None, **options: Any) -> Tensor:
        """Queries, keys and values, each [sequence, batch, heads, head_size] -> [sequence, batch, hidden]."""
        return super().forward(*arguments, packed_seq_params=self.tokens, **options)


class Crossing(CrossAttention):
    """megatron-core's cross attention, which has no argument for the offset that its layer hands over."""

    def __init__(self, *arguments: Any, pp_layer_offset: int | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)


class DecoderBlock(Block):
    """Changes the decoder's part, with the encoder's as what it attends to besides."""

    def __init__(self, config: TransformerConfig, submodules: Any, **options: Any) -> None:
        super().__init__(config, submodules, **options)
        self.cross_attn_bda = Residual(
            stream=2 * config.num_layers + 1 + self.layer_number,
            share=config.hidden_dropout,
            sequence_parallel=config.sequence_parallel,
        )

    def forward(self, hidden_states: Tensor, *arguments: Any, packed_seq_params: Any, **options: Any) -> Any:
        """[both, batch, hidden] -> (the same shape, None)."""
        streams: Streams = packed_seq_params
        others, ours = hidden_states.tensor_split([streams.length])
        self.cross_attn_bda.tokens = streams.decoder
        crossing: Any = self.cross_attention
        crossing.core_attention.tokens = streams.crossing
        options["context"] = others
        found, _ = super().forward(ours, *arguments, packed_seq_params=streams.decoder, **options)
        return torch.cat((others, found)), None


def _stack(config: ModelConfig) -> ModuleSpec:
    encoder = block(config, mlp(config), AttnMaskType.padding)
    encoder.module, encoder.params = EncoderBlock, {**encoder.params, "last": config.layers}
    decoder = block(config, mlp(config), AttnMaskType.causal)
    decoder.module = DecoderBlock
    parts = decoder.submodules
    assert isinstance(parts, TransformerLayerSubmodules)
    parts.pre_cross_attn_layernorm = norm
    parts.cross_attention = ModuleSpec(
        module=Crossing,
        params={"attn_mask_type": AttnMaskType.padding},
        submodules=CrossAttentionSubmodules(
            linear_q=ColumnParallelLinear,
            linear_kv=ColumnParallelLinear,
            core_attention=partial(CrossingAttention, description=config),  # pyright: ignore[reportArgumentType]
            linear_proj=RowParallelLinear,
        ),
    )
    return ModuleSpec(
        module=TransformerStack,
        params={"normed": True},
        submodules=HybridStackSubmodules(attention_layer=encoder, moe_layer=decoder),
    )


class EncoderDecoder(LanguageModel):
    """One chunk of a T5: both stacks, or one of them."""

    def __init__(
        self, layer_config: TransformerConfig, config: ModelConfig, *, topology: Topology, **options: Any
    ) -> None:
        super().__init__(layer_config, config, topology=topology, **options)
        bias = partial(RelativeBias, layer_config, config, topology)
        self.encoder_bias = bias(both_sides=True) if topology.is_first_pipeline_stage else None
        self.decoder_bias = bias(both_sides=False) if topology.is_last_pipeline_stage else None

    @classmethod
    def stack(cls, config: ModelConfig) -> ModuleSpec:
        return _stack(config)

    @classmethod
    def pattern(cls, config: ModelConfig, layout: ParallelConfig) -> str:
        assert config.decoder_layers is not None
        parts: Sequence[str] = (_ENCODER * config.layers, _DECODER * config.decoder_layers)
        return ("|" if layout.pipeline > 1 else "").join(parts)

    def embed(self, batch: dict[str, Tensor], context: Any) -> Tensor:
        """Both streams, from `encoder_tokens` and `tokens`, each [batch, its sequence / context]."""
        device = self.topology.device
        parts = []
        for name, tokens in (("encoder_tokens", context.encoder), ("tokens", context.decoder)):
            ids = batch[name].to(device, non_blocking=True)
            parts.append(self.dropped(self.embedding(input_ids=ids, position_ids=None), tokens))
        return torch.cat(parts)

    def predict(self, hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The logits of the decoder's tokens."""
        return super().predict(self._decoded(hidden))

    def losses(self, hidden: Tensor, batch: dict[str, Tensor], **options: Any) -> TokenLosses | tuple[Any, ...]:
        """What the decoder's tokens cost."""
        return super().losses(self._decoded(hidden), batch, **options)

    def _decoded(self, hidden: Tensor) -> Tensor:
        """The decoder's stream; where the output is tied to the embedding it is scaled, as in the first T5."""
        ours = hidden[self._length :]
        return ours * self.description.hidden_size**-0.5 if self.share_embeddings_and_output_weights else ours

    def context(self, batch: dict[str, Tensor]) -> Any:
        encoder_ids, decoder_ids = batch["encoder_document_ids"].cpu(), batch["document_ids"].cpu()
        held = self.topology.context
        first, second = encoder_ids.shape[1], decoder_ids.shape[1]
        keys = [None, None]
        if self.training and self.description.dropout:
            samples = batch["sample_ids"].to(self.topology.device, non_blocking=True)
            places = torch.arange(first + second, device=self.topology.device)
            keys = [self.own(token_keys(self.seed, samples, held.part(part))) for part in places.tensor_split([first])]
        ranks = self.topology.config.tensor if self.topology.sequence_parallel else 1
        self._length = first // held.size // ranks
        make = partial(LayerContext, rotation=None, weights=None, loss_factor=None)
        return Streams(
            encoder=make(
                pieces=find_pieces(encoder_ids, held.chunks(first), causal=False),
                dropout_keys=keys[0],
                bias=self.encoder_bias,
            ),
            decoder=make(
                pieces=find_pieces(decoder_ids, held.chunks(second)), dropout_keys=keys[1], bias=self.decoder_bias
            ),
            crossing=make(pieces=find_crossings(decoder_ids, encoder_ids, held.chunks(second)), dropout_keys=None),
            length=self._length,
        )
