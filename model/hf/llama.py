"""Llama and those that differ from it by a bias, a norm, a window or experts: Mistral, Mixtral, Qwen2, Qwen3."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.hf.pairs import Pair, experts, gated_experts, halves, queries_keys_values, same, vocabulary
from model.hf.settings import Settings

_FIELDS = {
    "vocab_size": "vocabulary_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
    "max_position_embeddings": "positions",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "initial_std",
}
_REQUIRED = {"hidden_act": ("silu",)}
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_NO_WINDOW = {"use_sliding_window": (False, None)}  # then `sliding_window` and `layer_types` say nothing more

LLAMA = Settings(
    architecture="LlamaForCausalLM",
    fields=_FIELDS,
    constants={},
    defaults=_DEFAULTS,
    required={**_REQUIRED, "attention_bias": (False, None), "mlp_bias": (False, None)},
)
MISTRAL = Settings(
    architecture="MistralForCausalLM",
    fields={**_FIELDS, "sliding_window": "sliding_window"},
    constants={},
    defaults={**_DEFAULTS, "sliding_window": 4096},
    required=_REQUIRED,
)
QWEN2 = Settings(
    architecture="Qwen2ForCausalLM",
    fields=_FIELDS,
    constants={"attention_bias": True},
    defaults=_DEFAULTS,
    required={**_REQUIRED, **_NO_WINDOW},
    no_matter=frozenset({"sliding_window", "layer_types", "use_mrope"}),
)
QWEN3 = Settings(
    architecture="Qwen3ForCausalLM",
    fields=_FIELDS,
    constants={"qk_norm": True},
    defaults={**_DEFAULTS, "head_dim": 128},
    required={**_REQUIRED, **_NO_WINDOW, "attention_bias": (False, None)},
    no_matter=frozenset({"sliding_window", "layer_types"}),
)
MIXTRAL = Settings(
    architecture="MixtralForCausalLM",
    fields={
        **_FIELDS,
        "sliding_window": "sliding_window",
        "num_local_experts": "moe.experts",
        "num_experts_per_tok": "moe.top_k",
    },
    constants={"moe.normalise_top_k": True},
    defaults={**_DEFAULTS, "rms_norm_eps": 1e-5},
    required=_REQUIRED,
)
QWEN3_MOE = replace(
    QWEN3,
    architecture="Qwen3MoeForCausalLM",
    fields={
        **_FIELDS,
        "moe_intermediate_size": "moe.ffn_hidden_size",
        "num_experts": "moe.experts",
        "num_local_experts": "moe.experts",
        "num_experts_per_tok": "moe.top_k",
        "norm_topk_prob": "moe.normalise_top_k",
    },
    defaults={**_DEFAULTS, "norm_topk_prob": False, "num_experts_per_tok": 8},
    required={**QWEN3.required, "decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertNames:
    """What a family calls the parts of a layer's mixture; `{expert}` is the number of an expert."""

    mixture: str
    gate: str
    up: str
    down: str


MIXTRAL_EXPERTS = ExpertNames(
    mixture="block_sparse_moe.", gate="experts.{expert}.w1", up="experts.{expert}.w3", down="experts.{expert}.w2"
)
QWEN3_EXPERTS = ExpertNames(
    mixture="mlp.",
    gate="experts.{expert}.gate_proj",
    up="experts.{expert}.up_proj",
    down="experts.{expert}.down_proj",
)


def pairs(config: ModelConfig, *, names: ExpertNames = QWEN3_EXPERTS) -> Iterator[Pair]:
    """All tensors of a model."""
    yield vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", config)
    for layer in range(config.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield from attention_pairs(f"{ours}self_attention.", f"{theirs}self_attn.", config)
        yield same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight")
        yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight")
        if config.moe.experts:
            yield from experts_pairs(f"{ours}mlp.", theirs, config, names)
        else:
            yield from mlp_pairs(f"{ours}mlp.", f"{theirs}mlp.")
    yield same("decoder.final_norm.weight", "model.norm.weight")
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", "lm_head.weight", config)


def mlp_pairs(ours: str, theirs: str) -> Iterator[Pair]:
    """A gated MLP."""
    yield halves(f"{ours}linear_fc1.weight", (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"))
    yield same(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight")


def attention_pairs(ours: str, theirs: str, config: ModelConfig) -> Iterator[Pair]:
    """Queries, keys, values and what follows, with biases and norms where the model has them."""
    for kind in ("weight", "bias") if config.attention_bias else ("weight",):
        names = (f"{theirs}q_proj.{kind}", f"{theirs}k_proj.{kind}", f"{theirs}v_proj.{kind}")
        yield queries_keys_values(f"{ours}linear_qkv.{kind}", names, config)
    yield same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight")
    if config.qk_norm:
        yield same(f"{ours}q_layernorm.weight", f"{theirs}q_norm.weight")
        yield same(f"{ours}k_layernorm.weight", f"{theirs}k_norm.weight")


def experts_pairs(ours: str, theirs: str, config: ModelConfig, names: ExpertNames) -> Iterator[Pair]:
    """A router and the experts that it chooses from."""
    theirs += names.mixture
    yield same(f"{ours}router.weight", f"{theirs}gate.weight")
    gated = (f"{theirs}{names.gate}.weight", f"{theirs}{names.up}.weight")
    yield gated_experts(f"{ours}experts.experts.linear_fc1.weight", gated, config)
    yield experts(f"{ours}experts.experts.linear_fc2.weight", f"{theirs}{names.down}.weight", config)
