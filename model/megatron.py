"""Models that Megatron-LM trained with its `GPTModel`: its arguments as a `ModelConfig`, its tensors by our names.

The layers are megatron-core's on both sides, so tensors are the same but for some names; what differs is which models
there can be. An argument that changes the model and that we lack is refused by name.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from model.config import FamilyName, ModelConfig
from model.hf.pairs import Pair, same, vocabulary
from parallel.common.errors import UserError

_VOCABULARY_MULTIPLE = 128
_LEGAL: Mapping[str, tuple[Any, ...]] = {
    "apply_layernorm_1p": (False, None),
    "apply_query_key_layer_scaling": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "heterogeneous_layers_config_path": (None,),
    "layernorm_zero_centered_gamma": (False, None),
    "moe_layer_freq": (1, None),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_num_groups": (None,),
    "moe_router_score_function": ("softmax", None),
    "moe_router_topk_scaling_factor": (None,),
    "moe_shared_expert_intermediate_size": (None,),
    "mtp_num_layers": (None,),
    "multi_latent_attention": (False, None),
    "position_embedding_type": ("rope", "learned_absolute"),
    "qk_l2_norm": (False, None),
    "quick_geglu": (False, None),
    "rotary_interleaved": (False, None),
    "rotary_percent": (1.0, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": ("vanilla", None),
    "squared_relu": (False, None),
    "window_size": (None,),
}
"""Argument to the values with which a model is one of ours; an absent one is None."""
_LAYER_NORMS = {
    "input_layernorm": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm": "mlp.linear_fc1.layer_norm_",
}
"""Our name to that of a norm which is one with the matrix after it; `weight` or `bias` follows."""


def model_values(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The `model:` block that Megatron-LM's arguments describe.

    Raises:
        UserError: an argument is missing or says what we lack; it names it.
    """
    for name, legal in _LEGAL.items():
        if (value := arguments.get(name)) not in legal:
            either = " or ".join(repr(word) for word in legal)
            raise UserError(f"the checkpoint's arguments say {name} = {value!r}: it is converted with {either} only.")
    given = _Arguments(arguments)
    gated, rotary = bool(given["swiglu"]), given["position_embedding_type"] == "rope"
    rows = given["padded_vocab_size"]
    padded = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    values = {
        "layers": given["num_layers"],
        "hidden_size": given["hidden_size"],
        "heads": given["num_attention_heads"],
        "kv_heads": given["num_query_groups"] if arguments.get("group_query_attention") else None,
        "head_size": arguments.get("kv_channels"),
        "ffn_hidden_size": given["ffn_hidden_size"],
        "activation": "swiglu" if gated else "gelu",
        "norm": {"LayerNorm": "layer", "RMSNorm": "rms"}[given["normalization"]],
        "norm_eps": given["norm_epsilon" if "norm_epsilon" in arguments else "layernorm_epsilon"],
        "position": "rope" if rotary else "learned",
        "positions": given["max_position_embeddings"],
        "rope_base": float(arguments.get("rotary_base") or 10000),
        "linear_bias": bool(given["add_bias_linear"]),
        "attention_bias": bool(arguments.get("add_qkv_bias")) and not given["add_bias_linear"],
        "qk_norm": bool(arguments.get("qk_layernorm")),
        "tie_embeddings": not given["untie_embeddings_and_output_weights"],
        "vocabulary_size": padded,
        "unpadded_vocabulary_size": None if rows == padded else rows,
    }
    if arguments.get("use_rope_scaling"):
        values["rope_scaling"] = {"factor": float(arguments.get("rope_scaling_factor") or 8)}
    if arguments.get("num_experts"):
        values["moe"] = {
            "experts": given["num_experts"],
            "top_k": given["moe_router_topk"],
            "ffn_hidden_size": arguments.get("moe_ffn_hidden_size"),
            "normalise_top_k": not arguments.get("moe_router_pre_softmax"),
        }
    return {"family": _family(values), **{name: value for name, value in values.items() if value is not None}}


class _Arguments:
    """Arguments that must be there."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments

    def __getitem__(self, name: str) -> Any:
        if self._arguments.get(name) is None:
            raise UserError(f"the checkpoint's arguments do not say {name}.")
        return self._arguments[name]


def _family(values: Mapping[str, Any]) -> str:
    """The nearest family of Hugging Face's, for an export; which may still refuse."""
    if "moe" in values:
        return FamilyName.mixtral.value
    if values["position"] == "learned":
        return FamilyName.gpt2.value
    if values["qk_norm"]:
        return FamilyName.qwen3.value
    return (FamilyName.qwen2 if values["attention_bias"] else FamilyName.llama).value


def pairs(config: ModelConfig, names: Collection[str]) -> Iterator[Pair]:
    """Every tensor of a model; `names` says how norms are called, which depends on who computes them."""
    norm_kinds = ("weight", "bias") if config.norm == "layer" else ("weight",)
    kinds = ("weight", "bias") if config.linear_bias else ("weight",)
    query_kinds = ("weight", "bias") if config.linear_bias or config.attention_bias else ("weight",)
    yield vocabulary("embedding.word_embeddings.weight", "embedding.word_embeddings.weight", config)
    if config.position == "learned":
        yield same("embedding.position_embeddings.weight", "embedding.position_embeddings.weight")
    for layer in range(config.layers):
        prefix = f"decoder.layers.{layer}."
        for ours, fused in _LAYER_NORMS.items():
            for kind in norm_kinds:
                plain = f"{prefix}{ours}.{kind}"
                yield same(plain, plain if plain in names else f"{prefix}{fused}{kind}")
        matrices = [(f"self_attention.linear_qkv.{kind}") for kind in query_kinds]
        matrices += [f"self_attention.linear_proj.{kind}" for kind in kinds]
        if config.qk_norm:
            matrices += [f"self_attention.{which}_layernorm.weight" for which in "qk"]
        if config.moe.experts:
            matrices += ["mlp.router.weight", *(f"mlp.experts.experts.linear_{fc}.weight" for fc in ("fc1", "fc2"))]
        else:
            matrices += [f"mlp.linear_{fc}.{kind}" for fc in ("fc1", "fc2") for kind in kinds]
        for name in matrices:
            yield same(prefix + name, prefix + name)
    for kind in norm_kinds:
        yield same(f"decoder.final_norm.{kind}", f"decoder.final_layernorm.{kind}")
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", "output_layer.weight", config)
