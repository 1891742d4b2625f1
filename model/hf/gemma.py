"""Gemma 2 and 3: norms before and after, weights of norms counted from one, scaled embeddings, windows that alternate
with whole attention; soft-caps in 2, norms of queries and keys and two rotary bases in 3."""

from collections.abc import Iterator

from model.config import Activation, ModelConfig, Norm
from model.hf.llama import attention_pairs, mlp_pairs
from model.hf.pairs import Pair, same, vocabulary
from model.hf.readings import ROPE, TWO_ROPES, alternating_windows
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
    "sliding_window": "sliding_window",
    "query_pre_attn_scalar": "query_pre_attention_scalar",
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logit_softcap",
}
_CONSTANTS = {
    "activation": Activation.geglu,
    "norm": Norm.zero_centered_rms,
    "post_norms": True,
    "scale_embeddings": True,
}
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_REQUIRED = {
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh",),
    "attention_bias": (False, None),
    "use_bidirectional_attention": (False, None),
}
_NO_MATTER = frozenset({"cache_implementation"})

GEMMA2 = Settings(
    architecture="Gemma2ForCausalLM",
    fields=_FIELDS,
    constants=_CONSTANTS,
    defaults={**_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    required=_REQUIRED,
    no_matter=_NO_MATTER,
    readings=(ROPE, alternating_windows(2)),
)
GEMMA3 = Settings(
    architecture="Gemma3ForCausalLM",
    fields=_FIELDS,
    constants={**_CONSTANTS, "qk_norm": True},
    defaults=_DEFAULTS,
    required=_REQUIRED,
    no_matter=_NO_MATTER,
    readings=(TWO_ROPES, alternating_windows(6)),
)


def pairs(config: ModelConfig) -> Iterator[Pair]:
    """All tensors of a model."""
    yield vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight", config)
    for layer in range(config.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield from attention_pairs(f"{ours}self_attention.", f"{theirs}self_attn.", config)
        yield from mlp_pairs(f"{ours}mlp.", f"{theirs}mlp.")
        yield same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight")
        yield same(f"{ours}post_attention_layernorm.weight", f"{theirs}post_attention_layernorm.weight")
        yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}pre_feedforward_layernorm.weight")
        yield same(f"{ours}post_mlp_layernorm.weight", f"{theirs}post_feedforward_layernorm.weight")
    yield same("decoder.final_norm.weight", "model.norm.weight")
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", "lm_head.weight", config)
