"""DeepSeek-V2 and V3: latent attention, small experts beside shared ones; the router by softmax in 2, by sigmoid with a
bias in 3.

Rotary channels alternate in their files (0 and 1 turn together, 2 and 3 ...) and stand behind the others; ours lie in
two halves, in front. Rows are moved, nothing is computed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig, RouterScore
from model.hf.llama import QWEN3_EXPERTS, experts_pairs, mlp_pairs
from model.hf.pairs import Pair, same, vocabulary
from model.hf.readings import ROPE, Left, Reading
from model.hf.settings import Settings
from parallel.common.errors import UserError


def _read_heads(left: Left, values: Mapping[str, Any], family: str) -> dict[str, Any]:
    turning = left.pop("qk_rope_head_dim", 64)
    return {"head_size": left.pop("qk_nope_head_dim", 128) + turning, "latent.rope_head_size": turning}


def _write_heads(config: ModelConfig, _: int) -> dict[str, Any]:
    still, turning = _sizes(config)
    return {"qk_nope_head_dim": still, "qk_rope_head_dim": turning}


def _read_shared(left: Left, values: Mapping[str, Any], family: str) -> dict[str, Any]:
    shared = left.pop("n_shared_experts", None)
    return {"moe.shared_ffn_hidden_size": shared and shared * values["moe"]["ffn_hidden_size"]}


def _write_shared(config: ModelConfig, _: int) -> dict[str, Any]:
    shared, one = config.moe.shared_ffn_hidden_size, config.moe.ffn_hidden_size or config.ffn_hidden_size
    if shared is None or shared % one:
        raise UserError(
            f"a {config.family} has model.moe.shared_ffn_hidden_size = {shared}: export needs a multiple of an "
            f"expert's {one}"
        )
    return {"n_shared_experts": shared // one}


def _read_method(left: Left, values: Mapping[str, Any], family: str) -> dict[str, Any]:
    method = left.pop("topk_method", "greedy")
    groups, best = left.pop("n_group", None), left.pop("topk_group", None)
    if method not in ("greedy", "group_limited_greedy"):
        raise UserError(
            f"config.json says topk_method = {method!r}: a {family} is converted with 'greedy' or in groups"
        )
    return {"moe.groups": groups, "moe.top_groups": best} if method != "greedy" else {}


def _write_method(config: ModelConfig, _: int) -> dict[str, Any]:
    groups = config.moe.groups
    method = "greedy" if groups == 1 else "group_limited_greedy"
    return {"topk_method": method, "n_group": groups, "topk_group": config.moe.top_groups}


_HEADS = Reading(ours=frozenset({"head_size", "latent.rope_head_size"}), read=_read_heads, write=_write_heads)
_SHARED = Reading(ours=frozenset({"moe.shared_ffn_hidden_size"}), read=_read_shared, write=_write_shared)
_METHOD = Reading(ours=frozenset({"moe.groups", "moe.top_groups"}), read=_read_method, write=_write_method)

_FIELDS = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initial_std",
    "q_lora_rank": "latent.q_rank",
    "kv_lora_rank": "latent.kv_rank",
    "v_head_dim": "latent.value_head_size",
    "moe_intermediate_size": "moe.ffn_hidden_size",
    "n_routed_experts": "moe.experts",
    "num_experts_per_tok": "moe.top_k",
    "first_k_dense_replace": "moe.first_layer",
    "routed_scaling_factor": "moe.scale",
}
_REQUIRED = {"hidden_act": ("silu",), "attention_bias": (False, None), "moe_layer_freq": (1,)}
_NO_MATTER = frozenset(
    {"head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux", "num_nextn_predict_layers", "auto_map"}
)
DEEPSEEK_V2 = Settings(
    architecture="DeepseekV2ForCausalLM",
    fields=_FIELDS,
    constants={"moe.score": RouterScore.softmax, "moe.normalise_top_k": False, "moe.group_experts": 1},
    defaults={"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    required={**_REQUIRED, "mlp_bias": (False, None), "norm_topk_prob": (False,), "scoring_func": ("softmax",)},
    no_matter=_NO_MATTER,
    readings=(ROPE, _HEADS, _SHARED, _METHOD),
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    architecture="DeepseekV3ForCausalLM",
    fields={
        **_FIELDS,
        "n_group": "moe.groups",
        "topk_group": "moe.top_groups",
        "norm_topk_prob": "moe.normalise_top_k",
    },
    constants={"moe.score": RouterScore.sigmoid, "moe.expert_bias": True, "moe.group_experts": 2},
    required={
        **_REQUIRED,
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    readings=(ROPE, _HEADS, _SHARED),
)


def _sizes(config: ModelConfig) -> tuple[int, int]:
    """Channels of a head that stay, and that turn."""
    assert config.head_size is not None
    return config.head_size - config.latent.rope_head_size, config.latent.rope_head_size


def _halves(rows: Tensor) -> Tensor:
    """[..., channels, in] of which neighbours turn together, as two halves."""
    return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), dim=-2)


def _alternating(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2, dim=-2)
    return torch.stack((first, second), dim=-2).flatten(-3, -2)


def _moved(ours: str, theirs: str, to_ours: Callable[[Tensor], Tensor], to_theirs: Callable[[Tensor], Tensor]) -> Pair:
    return Pair(
        ours=ours, theirs=(theirs,), split=lambda tensor: [to_theirs(tensor)], join=lambda tensors: to_ours(tensors[0])
    )


def _queries(ours: str, theirs: str, config: ModelConfig) -> Pair:
    """Head by head: still, then turning in theirs."""
    still, turning = _sizes(config)

    def to_ours(tensor: Tensor) -> Tensor:
        stay, turn = tensor.unflatten(0, (config.heads, -1)).split((still, turning), dim=1)
        return torch.cat((_halves(turn), stay), dim=1).flatten(0, 1)

    def to_theirs(tensor: Tensor) -> Tensor:
        turn, stay = tensor.unflatten(0, (config.heads, -1)).split((turning, still), dim=1)
        return torch.cat((stay, _alternating(turn)), dim=1).flatten(0, 1)

    return _moved(ours, theirs, to_ours, to_theirs)


def _latent(ours: str, theirs: str, config: ModelConfig) -> Pair:
    """The latent of keys and values, then the channels that turn."""
    rank = config.latent.kv_rank

    def with_last(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda tensor: torch.cat((tensor[:rank], change(tensor[rank:])))

    return _moved(ours, theirs, with_last(_halves), with_last(_alternating))


def _attention(ours: str, theirs: str, config: ModelConfig) -> Iterator[Pair]:
    if config.latent.q_rank is None:
        yield _queries(f"{ours}linear_q.weight", f"{theirs}q_proj.weight", config)
    else:
        yield same(f"{ours}linear_q_down.weight", f"{theirs}q_a_proj.weight")
        yield same(f"{ours}q_norm.weight", f"{theirs}q_a_layernorm.weight")
        yield _queries(f"{ours}linear_q.weight", f"{theirs}q_b_proj.weight", config)
    yield _latent(f"{ours}linear_kv_down.weight", f"{theirs}kv_a_proj_with_mqa.weight", config)
    yield same(f"{ours}kv_norm.weight", f"{theirs}kv_a_layernorm.weight")
    yield same(f"{ours}linear_kv.weight", f"{theirs}kv_b_proj.weight")
    yield same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight")


def _mixture(ours: str, theirs: str, config: ModelConfig) -> Iterator[Pair]:
    yield from experts_pairs(ours, theirs, config, QWEN3_EXPERTS)
    if config.moe.expert_bias:
        yield same(f"{ours}router.bias", f"{theirs}mlp.gate.e_score_correction_bias")
    yield from mlp_pairs(f"{ours}shared_experts.", f"{theirs}mlp.shared_experts.")


def pairs(config: ModelConfig) -> Iterator[Pair]:
    """All tensors of a model."""
    yield vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", config)
    for layer in range(config.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield from _attention(f"{ours}self_attention.", f"{theirs}self_attn.", config)
        yield same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight")
        yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight")
        if config.moe.experts and layer >= config.moe.first_layer:
            yield from _mixture(f"{ours}mlp.", theirs, config)
        else:
            yield from mlp_pairs(f"{ours}mlp.", f"{theirs}mlp.")
    yield same("decoder.final_norm.weight", "model.norm.weight")
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", "lm_head.weight", config)
