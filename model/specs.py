"""The layers of a causal Transformer as megatron-core specs, from parts that run everywhere.

A pattern symbol of megatron-core's hybrid stack is a whole Transformer layer here (attention and MLP), so that layers
are blocks: their numbers, their share in a pipeline and their recomputation all count the same thing.
"""

from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.functional import rms_norm

from model.attention import DocumentAttention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019, arXiv:1910.07467) that is right under sequence parallelism.

    Each tensor rank then sees its own part of the sequence, so the weight's gradient is a sum over the tensor ranks;
    the weight is read through an operation whose backward is that sum, inside the graph, before ZeRO reduces anything.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> the same shape."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.sequence_parallel else self.weight
        return rms_norm(hidden, self.weight.shape, weight, self.eps)


class TransformerStack(HybridStack):
    """megatron-core's hybrid stack with our norm at its end; upstream's asks for Transformer Engine's by name."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, **options: object) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **options)  # type: ignore[arg-type]
        self.post_layer_norm = self.post_process
        if self.post_process:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)


def transformer_layer() -> ModuleSpec:
    """Pre-norm attention and SwiGLU MLP."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=DocumentAttention,  # pyright: ignore[reportArgumentType]
                    linear_proj=RowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=RMSNorm,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )


def transformer_stack() -> ModuleSpec:
    """The stack whose every `ATTENTION` symbol is one `transformer_layer`."""
    return ModuleSpec(module=TransformerStack, submodules=HybridStackSubmodules(attention_layer=transformer_layer()))


LAYER_SYMBOL = hybrid_block.LayerSymbols.ATTENTION


def layer_pattern(layers: int, segments: int) -> str:
    """The hybrid pattern of `layers` blocks in equal pipeline segments: 4 layers in 2 segments are `**|**`."""
    return "|".join([LAYER_SYMBOL * (layers // segments)] * segments)
