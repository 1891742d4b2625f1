"""GPT-NeoX and Pythia: attention and MLP beside each other, a part of each head turns, LayerNorm, biases."""

from collections.abc import Iterator

from model.config import Activation, ModelConfig, Norm
from model.hf.pairs import Pair, same, vocabulary
from model.hf.readings import PARTIAL_ROPE
from model.hf.settings import Settings

GPT_NEOX = Settings(
    architecture="GPTNeoXForCausalLM",
    fields={
        "vocab_size": "vocabulary_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "positions",
        "layer_norm_eps": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "initial_std",
        "use_parallel_residual": "parallel_residual",
    },
    constants={"activation": Activation.exact_gelu, "norm": Norm.layer, "linear_bias": True},
    defaults={"layer_norm_eps": 1e-5, "tie_word_embeddings": False, "use_parallel_residual": True},
    required={"hidden_act": ("gelu",), "attention_bias": (True,)},
    no_matter=frozenset({"classifier_dropout", "hidden_dropout"}),
    readings=(PARTIAL_ROPE,),
)


def pairs(config: ModelConfig) -> Iterator[Pair]:
    """All tensors of a model; queries, keys and values lie head by head on both sides."""
    yield vocabulary("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight", config)
    for layer in range(config.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"gpt_neox.layers.{layer}."
        for kind in ("weight", "bias"):
            yield same(f"{ours}self_attention.linear_qkv.{kind}", f"{theirs}attention.query_key_value.{kind}")
            yield same(f"{ours}self_attention.linear_proj.{kind}", f"{theirs}attention.dense.{kind}")
            yield same(f"{ours}mlp.linear_fc1.{kind}", f"{theirs}mlp.dense_h_to_4h.{kind}")
            yield same(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}mlp.dense_4h_to_h.{kind}")
            yield same(f"{ours}input_layernorm.{kind}", f"{theirs}input_layernorm.{kind}")
            yield same(f"{ours}pre_mlp_layernorm.{kind}", f"{theirs}post_attention_layernorm.{kind}")
    yield same("decoder.final_norm.weight", "gpt_neox.final_layer_norm.weight")
    yield same("decoder.final_norm.bias", "gpt_neox.final_layer_norm.bias")
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", "embed_out.weight", config)
