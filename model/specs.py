"""The layers of a Transformer as megatron-core specs, from parts that run everywhere.

A pattern symbol of megatron-core's hybrid stack is a whole Transformer layer here (attention and MLP), so that layers
are blocks: their numbers, their share in a pipeline and their recomputation all count the same thing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from model.attention import DocumentAttention
from model.config import ModelConfig, NormPlacement
from model.dropout import Residual
from model.gate import Gate
from model.latent_attention import LatentAttention
from model.moe import Router, mixture
from model.norms import HeadNorm, RMSNorm, norm


class TransformerStack(HybridStack):
    """megatron-core's hybrid stack with our norm at its end; upstream's asks for Transformer Engine's by name."""

    def __init__(
        self, config: TransformerConfig, submodules: HybridStackSubmodules, *, normed: bool, **options: object
    ) -> None:
        """`normed`: a norm stands behind the last block."""
        super().__init__(config, submodules, post_layer_norm=False, **options)  # type: ignore[arg-type]
        self.post_layer_norm = self.post_process and normed
        if self.post_layer_norm:
            self.final_norm = norm(config, config.hidden_size, config.layernorm_epsilon)


class Block(TransformerLayer):
    """megatron-core's layer; hands what it knows of the tokens to those of its parts that have no argument for it."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *,
        post_norms: bool,
        sum_norms: bool,
        **options: Any,
    ) -> None:
        """`post_norms`: what attention and MLP found is normed; `sum_norms`: each sum into the residual stream is."""
        super().__init__(config, submodules, **options)
        self.post_attention_layernorm = self.post_mlp_layernorm = None
        if post_norms:
            self.post_attention_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
            self.post_mlp_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
        residual = partial(Residual, share=config.hidden_dropout, sequence_parallel=config.sequence_parallel)
        norms = [norm(config, config.hidden_size, config.layernorm_epsilon) if sum_norms else None for _ in range(2)]
        self.self_attn_bda = residual(
            stream=2 * self.layer_number, norm=_calling(self.post_attention_layernorm), sum_norm=norms[0]
        )
        self.mlp_bda = residual(
            stream=2 * self.layer_number + 1, norm=_calling(self.post_mlp_layernorm), sum_norm=norms[1]
        )
        routers = [part for part in self.modules() if isinstance(part, Router)]
        self.told: list[Any] = [self.self_attn_bda, self.mlp_bda, *routers]
        """Parts that are handed the tokens before each forward pass."""

    def forward(self, *arguments: Any, packed_seq_params: Any, **options: Any) -> Any:
        """[sequence, batch, hidden] and a `LayerContext` -> (the same shape, None)."""
        for part in self.told:
            part.tokens = packed_seq_params
        return super().forward(*arguments, packed_seq_params=packed_seq_params, **options)


def _calling(found: torch.nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """The norm as a function, which a module that holds it does not register once more."""
    return None if found is None else found.__call__


class ParallelBlock(Block):
    """A block whose MLP reads what its attention reads (GPT-NeoX): x + attention(norm(x)) + mlp(other norm(x))."""

    _entered: Tensor | None = None

    def forward(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        """As that of `Block`."""
        self._entered = hidden_states
        found = super().forward(hidden_states, *arguments, **options)
        self._entered = None
        return found

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        """megatron-core's step between the halves: what it returns is the MLP's, the residual stream stays its own."""
        assert self._entered is not None
        return super()._forward_pre_mlp_layernorm(self._entered)


def _attention(config: ModelConfig, mask: AttnMaskType) -> ModuleSpec:
    if config.latent.kv_rank is not None:
        return ModuleSpec(module=LatentAttention, params={"description": config, "norm": RMSNorm})
    head_norm = HeadNorm if config.qk_norm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=partial(DocumentAttention, description=config),  # pyright: ignore[reportArgumentType]
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def mlp(config: ModelConfig) -> partial[MLP]:
    """A block's MLP."""
    return partial(MLP.as_mlp_submodule, submodules=_inner(config))


def _inner(config: ModelConfig) -> MLPSubmodules:
    gate = partial(Gate, kind=config.activation) if config.activation.gated else None
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=gate)


def block(config: ModelConfig, inner: Any, mask: AttnMaskType) -> ModuleSpec:
    """Attention, and an MLP or a mixture of them."""
    after = config.norm_placement is NormPlacement.after
    before = IdentityOp if after else norm
    return ModuleSpec(
        module=ParallelBlock if config.parallel_residual else Block,
        params={"post_norms": config.post_norms, "sum_norms": after},
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=_attention(config, mask),
            pre_mlp_layernorm=before,
            mlp=inner,
        ),
    )


def transformer_stack(config: ModelConfig, mask: AttnMaskType = AttnMaskType.causal) -> ModuleSpec:
    """The stack whose every symbol is one block, `DENSE` or `EXPERTS`; `mask` causal, or padding: all of a document."""
    return ModuleSpec(
        module=TransformerStack,
        params={"normed": config.norm_placement is NormPlacement.before},
        submodules=HybridStackSubmodules(
            attention_layer=block(config, mlp(config), mask),
            moe_layer=block(config, mixture(_inner(config), config.moe), mask),
        ),
    )


DENSE, EXPERTS = hybrid_block.LayerSymbols.ATTENTION, hybrid_block.LayerSymbols.MOE


def layer_pattern(config: ModelConfig, split: Sequence[int]) -> str:
    """The hybrid pattern of all blocks, cut into pipeline chunks of `split` layers: `**|*E` is 4 layers in 2 chunks."""
    symbols = "".join(
        EXPERTS if config.moe.experts and layer >= config.moe.first_layer else DENSE for layer in range(config.layers)
    )
    ends = list(accumulate(split))
    return "|".join(symbols[end - length : end] for end, length in zip(ends, split, strict=True))
