"""T5, the first one (ReLU, one matrix for both ends) and 1.1 (gated GELU, an output layer of its own)."""

from collections.abc import Iterator, Mapping
from typing import Any

from model.config import Activation, ModelConfig, Position
from model.hf.pairs import Pair, halves, keys_values, queries_keys_values, same, vocabulary
from model.hf.readings import Left, Reading
from model.hf.settings import Settings
from parallel.common.errors import UserError

_PROJECTIONS = {"relu": Activation.relu, "gated-gelu": Activation.geglu}


def _read_projection(left: Left, _: Mapping[str, Any], family: str) -> dict[str, Any]:
    said = left.pop("feed_forward_proj", "relu")
    for key in ("dense_act_fn", "is_gated_act"):  # follow from it
        left.pop(key, None)
    if said not in _PROJECTIONS:
        raise UserError(
            f"config.json says feed_forward_proj = {said!r}: a {family} is converted with relu or gated-gelu"
        )
    return {"activation": _PROJECTIONS[said]}


def _write_projection(config: ModelConfig, _: int) -> dict[str, Any]:
    said = next((name for name, activation in _PROJECTIONS.items() if activation is config.activation), None)
    if said is None:
        raise UserError(f"a t5 has model.activation relu or geglu, and this model {config.activation.value}")
    return {"feed_forward_proj": said}


def _read_ties(left: Left, _: Mapping[str, Any], family: str) -> dict[str, Any]:
    """transformers 5 writes that everything is tied, and says in another key whether it is."""
    tied = left.pop("tie_word_embeddings", True)
    return {"tie_embeddings": left.pop("scale_decoder_outputs", tied)}


def _write_ties(config: ModelConfig, _: int) -> dict[str, Any]:
    return {"tie_word_embeddings": config.tie_embeddings}


T5 = Settings(
    architecture="T5ForConditionalGeneration",
    fields={
        "vocab_size": "vocabulary_size",
        "d_model": "hidden_size",
        "d_kv": "head_size",
        "d_ff": "ffn_hidden_size",
        "num_layers": "layers",
        "num_decoder_layers": "decoder_layers",
        "num_heads": "heads",
        "relative_attention_num_buckets": "relative_buckets",
        "relative_attention_max_distance": "relative_distance",
        "layer_norm_epsilon": "norm_eps",
    },
    constants={"position": Position.relative, "query_pre_attention_scalar": 1},
    defaults={
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
    },
    derived={"decoder_layers": lambda values: values["layers"]},
    required={"is_encoder_decoder": (True,)},
    no_matter=frozenset(
        {
            "classifier_dropout", "decoder_start_token_id", "dropout_rate", "initializer_factor", "n_positions",
            "output_past", "tokenizer_class",
        }
    ),
    readings=(
        Reading(ours=frozenset({"activation"}), read=_read_projection, write=_write_projection),
        Reading(ours=frozenset({"tie_embeddings"}), read=_read_ties, write=_write_ties),
    ),
)  # fmt: skip

COPIES: Mapping[str, str] = {
    "encoder.embed_tokens.weight": "shared.weight",
    "decoder.embed_tokens.weight": "shared.weight",
}
"""What a file may hold a second time under another name."""
_TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def pairs(config: ModelConfig) -> Iterator[Pair]:
    """All tensors of a model."""
    assert config.decoder_layers is not None
    yield vocabulary("embedding.word_embeddings.weight", "shared.weight", config)
    yield same("encoder_bias.weight", f"encoder.{_TABLE}")
    yield same("decoder_bias.weight", f"decoder.{_TABLE}")
    for layer in range(config.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"encoder.block.{layer}.layer."
        yield from _self_attention(ours, f"{theirs}0.", config)
        yield from _mlp(ours, f"{theirs}1.", config)
    yield same(f"decoder.layers.{config.layers - 1}.final_norm.weight", "encoder.final_layer_norm.weight")
    for layer in range(config.decoder_layers):
        ours, theirs = f"decoder.layers.{config.layers + layer}.", f"decoder.block.{layer}.layer."
        yield from _self_attention(ours, f"{theirs}0.", config)
        crossing, found = f"{ours}cross_attention.", f"{theirs}1.EncDecAttention."
        yield same(f"{ours}pre_cross_attn_layernorm.weight", f"{theirs}1.layer_norm.weight")
        yield same(f"{crossing}linear_q.weight", f"{found}q.weight")
        yield keys_values(f"{crossing}linear_kv.weight", (f"{found}k.weight", f"{found}v.weight"), config)
        yield same(f"{crossing}linear_proj.weight", f"{found}o.weight")
        yield from _mlp(ours, f"{theirs}2.", config)
    yield same("decoder.final_norm.weight", "decoder.final_layer_norm.weight")
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", "lm_head.weight", config)


def _self_attention(ours: str, theirs: str, config: ModelConfig) -> Iterator[Pair]:
    found = f"{theirs}SelfAttention."
    yield same(f"{ours}input_layernorm.weight", f"{theirs}layer_norm.weight")
    names = (f"{found}q.weight", f"{found}k.weight", f"{found}v.weight")
    yield queries_keys_values(f"{ours}self_attention.linear_qkv.weight", names, config)
    yield same(f"{ours}self_attention.linear_proj.weight", f"{found}o.weight")


def _mlp(ours: str, theirs: str, config: ModelConfig) -> Iterator[Pair]:
    found = f"{theirs}DenseReluDense."
    yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}layer_norm.weight")
    if config.activation.gated:
        yield halves(f"{ours}mlp.linear_fc1.weight", (f"{found}wi_0.weight", f"{found}wi_1.weight"))
    else:
        yield same(f"{ours}mlp.linear_fc1.weight", f"{found}wi.weight")
    yield same(f"{ours}mlp.linear_fc2.weight", f"{found}wo.weight")
