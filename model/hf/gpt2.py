"""GPT-2: learned positions, LayerNorm, biases, matrices stored [in, out]."""

from collections.abc import Iterator

from model.config import Activation, ModelConfig, Norm, Position
from model.hf.pairs import Pair, fused_queries_keys_values, same, transposed, vocabulary
from model.hf.settings import Settings

GPT2 = Settings(
    architecture="GPT2LMHeadModel",
    fields={
        "vocab_size": "vocabulary_size",
        "n_embd": "hidden_size",
        "n_layer": "layers",
        "n_head": "heads",
        "n_inner": "ffn_hidden_size",
        "n_positions": "positions",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "initial_std",
    },
    constants={
        "activation": Activation.gelu,
        "norm": Norm.layer,
        "position": Position.learned,
        "linear_bias": True,
    },
    derived={"ffn_hidden_size": lambda values: 4 * values["hidden_size"]},
    defaults={"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
    required={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),
        "add_cross_attention": (False,),
    },
    no_matter=frozenset(
        {
            "attn_pdrop",
            "embd_pdrop",
            "resid_pdrop",
            "n_ctx",
            "summary_activation",
            "summary_first_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    readings=(),
)


def pairs(config: ModelConfig) -> Iterator[Pair]:
    """All tensors of a model."""
    yield vocabulary("embedding.word_embeddings.weight", "transformer.wte.weight", config)
    yield same("embedding.position_embeddings.weight", "transformer.wpe.weight")
    for layer in range(config.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.h.{layer}."
        for kind, matrix in (("weight", transposed), ("bias", same)):
            yield fused_queries_keys_values(
                f"{ours}self_attention.linear_qkv.{kind}", f"{theirs}attn.c_attn.{kind}", config
            )
            yield matrix(f"{ours}self_attention.linear_proj.{kind}", f"{theirs}attn.c_proj.{kind}")
            yield matrix(f"{ours}mlp.linear_fc1.{kind}", f"{theirs}mlp.c_fc.{kind}")
            yield matrix(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}mlp.c_proj.{kind}")
            yield same(f"{ours}input_layernorm.{kind}", f"{theirs}ln_1.{kind}")
            yield same(f"{ours}pre_mlp_layernorm.{kind}", f"{theirs}ln_2.{kind}")
    yield same("decoder.final_norm.weight", "transformer.ln_f.weight")
    yield same("decoder.final_norm.bias", "transformer.ln_f.bias")
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", "lm_head.weight", config)
