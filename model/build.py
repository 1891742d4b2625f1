"""From a `ModelConfig` to this rank's chunks, with the same initial values in every layout.

Each parameter's initial value is drawn whole from (seed, global name) and cut to this rank's shard, so that no layout,
rank count or order of construction changes it. The global name and the shard come from megatron-core's sharded state,
the same description that checkpoints use.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import xxhash
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from model import fp8, mup
from model.bert import MaskedLanguageModel
from model.config import Activation, ModelConfig, Norm
from model.families import Architecture, family
from model.language_model import LanguageModel
from model.lora import adapt
from model.projections import A, B
from model.t5 import EncoderDecoder
from parallel.config import Recompute
from parallel.cpu import has_gpu
from parallel.parameters import local_parameters
from parallel.topology import Topology

_CHUNKS: Mapping[Architecture, type[LanguageModel]] = {
    Architecture.causal: LanguageModel,
    Architecture.encoder: MaskedLanguageModel,
    Architecture.encoder_decoder: EncoderDecoder,
}
OWN_CHUNKS: dict[str, type[LanguageModel]] = {}
"""Of families of plugins, by their name (`model.register`)."""
_ACTIVATIONS = {
    Activation.swiglu: silu,
    Activation.geglu: gelu,
    Activation.gelu: partial(gelu, approximate="tanh"),
    Activation.exact_gelu: gelu,
    Activation.relu: relu,
}
_INTO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def transformer_config(config: ModelConfig, *, dtype: torch.dtype, topology: Topology) -> TransformerConfig:
    """megatron-core's configuration of one layer, for this layout."""
    layout, moe = topology.config, config.moe
    full = layout.recompute.mode is Recompute.full
    return TransformerConfig(
        num_layers=config.depth,
        hidden_size=config.hidden_size,
        num_attention_heads=config.heads,
        num_query_groups=config.kv_heads or config.heads,
        kv_channels=config.head_size or config.hidden_size // config.heads,
        ffn_hidden_size=config.ffn_hidden_size,
        normalization="LayerNorm" if config.norm is Norm.layer else "RMSNorm",
        layernorm_zero_centered_gamma=config.norm is Norm.zero_centered_rms,
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=config.activation.gated,
        activation_func=_ACTIVATIONS[config.activation],
        use_te_activation_func=config.activation.gated,  # it is ours: `model.gate`
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        add_bias_linear=config.linear_bias,
        add_qkv_bias=config.attention_bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=config.dropout,
        attention_dropout=0.0,
        num_moe_experts=moe.experts or None,
        moe_router_topk=moe.top_k,
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=moe.top_k == 1,  # of a router that is not ours; a single expert is refused without it
        moe_ffn_hidden_size=(moe.ffn_hidden_size or config.ffn_hidden_size) if moe.experts else None,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
        moe_token_dispatcher_type=moe.dispatcher.value,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.tensor,
        sequence_parallel=topology.sequence_parallel,
        recompute_granularity=None if layout.recompute.mode is Recompute.none else layout.recompute.mode.value,
        recompute_method="block" if full else None,
        recompute_num_layers=(layout.recompute.blocks or config.depth) if full else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=not has_gpu(),
        perform_initialization=False,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        batch_p2p_sync=False,
    )


def initial_value(key: str, shape: tuple[int, ...], *, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial value of a parameter, float32, a function of the seed and its global name alone."""
    if key.endswith("bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(f"{seed}:initial:{key}".encode()) >> 1)
    if key.endswith(f".{A}"):
        bound = shape[1] ** -0.5  # as `peft` draws them
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if key.endswith(f".{B}"):
        return torch.empty(shape).normal_(std=config.lora.initial_std, generator=generator)
    if len(shape) == 1:
        return torch.zeros(shape) if config.norm is Norm.zero_centered_rms else torch.ones(shape)
    deviation = config.initial_std * mup.deviation_factor(key, config)
    if key.endswith(_INTO_RESIDUAL):
        deviation /= math.sqrt(2 * config.depth)
    return torch.empty(shape).normal_(std=deviation, generator=generator)


@torch.no_grad()
def initialise(chunk: torch.nn.Module, *, config: ModelConfig, seed: int) -> None:
    """Gives every parameter of a chunk its initial value, and what its learning rate is multiplied by."""
    for local in local_parameters([chunk], last_stage_of_several=False):
        factor = mup.learning_rate_factor(local.name, is_matrix=local.is_matrix, config=config)
        local.parameter.learning_rate_factor = factor  # type: ignore[attr-defined]
        for shard in local.shards:
            described = shard.description
            whole = initial_value(described.key, described.global_shape, config=config, seed=seed)
            shard.of(local.parameter.data).copy_(whole[described.global_slice()].view(described.local_shape))


def unsplit_linears(chunk: LanguageModel, *, in_eight_bits: bool = False) -> None:
    """Has torch itself multiply by the matrices of a chunk, of which no tensor rank shares any; those of blocks, but
    for experts', in eight bits if asked.

    megatron-core's functions around a product overlap and add up what other tensor ranks have, and are Python in both
    directions: some 0.2 ms a matrix and micro-batch on a CPU.
    """
    linears: list[Any] = [
        module for module in chunk.modules() if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    ]
    decoder: Any = chunk.decoder
    blocks = set(decoder.modules()) if in_eight_bits else set()
    for module in linears:
        multiply = fp8.linear if module in blocks and not module.is_expert else linear
        module.forward = partial(_multiplied, module, multiply)


def _multiplied(
    module: Any,
    multiply: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As the module's own forward."""
    del runtime_gather_output  # there is nobody to gather from
    bias = module.bias
    kept = bias if module.skip_bias_add else None
    weight = module.weight if weight is None else weight
    return multiply(hidden, weight, None if module.skip_bias_add else bias), kept


def build(
    config: ModelConfig,
    *,
    vocabulary_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    topology: Topology,
    seed: int,
    in_eight_bits: bool = False,
) -> list[LanguageModel]:
    """This rank's chunks of the model (one a virtual stage), initialised, on the rank's device; `in_eight_bits`: blocks
    multiply their matrices as `model.fp8` does, without tensor parallelism."""
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    layer_config = transformer_config(config, dtype=dtype, topology=topology)
    chunks: list[LanguageModel] = []
    for index in range(topology.config.virtual_pipeline):
        kind = OWN_CHUNKS.get(config.family) or _CHUNKS[family(config).architecture]
        chunk = kind(
            layer_config,
            config,
            vocabulary_size=vocabulary_size,
            sequence_length=sequence_length,
            topology=topology,
            chunk=index,
            seed=seed,
        ).to(topology.device)
        if topology.config.tensor == 1:
            unsplit_linears(chunk, in_eight_bits=in_eight_bits)
        if config.lora.rank is not None:
            adapt(chunk, config, topology)
        initialise(chunk, config=config, seed=seed)
        chunks.append(chunk)
    return chunks
