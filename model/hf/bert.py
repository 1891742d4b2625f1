"""BERT: norms behind the sums, two segments, a head over covered tokens and one over pairs of segments."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from model.config import Activation, ModelConfig, Norm, NormPlacement, Position
from model.hf.pairs import Pair, queries_keys_values, reversed_rows, same, vocabulary
from model.hf.settings import Settings

BERT = Settings(
    architecture=lambda config: "BertForPreTraining" if config.next_sentence else "BertForMaskedLM",
    fields={
        "vocab_size": "vocabulary_size",
        "hidden_size": "hidden_size",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "positions",
        "layer_norm_eps": "norm_eps",
        "initializer_range": "initial_std",
    },
    constants={
        "activation": Activation.exact_gelu,
        "norm": Norm.layer,
        "norm_placement": NormPlacement.after,
        "position": Position.learned,
        "linear_bias": True,
        "tie_embeddings": True,
    },
    defaults={"layer_norm_eps": 1e-12},
    required={
        "hidden_act": ("gelu",),
        "type_vocab_size": (2,),
        "position_embedding_type": ("absolute", None),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    said_by_names=("next_sentence",),
    no_matter=frozenset(
        {
            "attention_probs_dropout_prob", "classifier_dropout", "gradient_checkpointing", "hidden_dropout_prob",
            "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
            "pooler_size_per_head", "pooler_type",
        }
    ),
    readings=(),
)  # fmt: skip

COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
"""What a file may hold a second time under another name."""
OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}
"""Ends of names in the files of 2018, and what they are today."""


def from_names(names: Collection[str]) -> Mapping[str, Any]:
    """What the names of the tensors say and config.json does not."""
    return {"next_sentence": "cls.seq_relationship.weight" in names}


def pairs(config: ModelConfig) -> Iterator[Pair]:
    """All tensors of a model."""
    words = "bert.embeddings.word_embeddings.weight"
    yield vocabulary("embedding.word_embeddings.weight", words, config)
    yield same("embedding.position_embeddings.weight", "bert.embeddings.position_embeddings.weight")
    yield same("segments.weight", "bert.embeddings.token_type_embeddings.weight")
    for kind in ("weight", "bias"):
        yield same(f"embedding_norm.{kind}", f"bert.embeddings.LayerNorm.{kind}")
    for layer in range(config.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"bert.encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            attention = f"{theirs}attention.self."
            names = (f"{attention}query.{kind}", f"{attention}key.{kind}", f"{attention}value.{kind}")
            yield queries_keys_values(f"{ours}self_attention.linear_qkv.{kind}", names, config)
            yield same(f"{ours}self_attention.linear_proj.{kind}", f"{theirs}attention.output.dense.{kind}")
            yield same(f"{ours}self_attn_bda.sum_norm.{kind}", f"{theirs}attention.output.LayerNorm.{kind}")
            yield same(f"{ours}mlp.linear_fc1.{kind}", f"{theirs}intermediate.dense.{kind}")
            yield same(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}output.dense.{kind}")
            yield same(f"{ours}mlp_bda.sum_norm.{kind}", f"{theirs}output.LayerNorm.{kind}")
    for kind in ("weight", "bias"):
        yield same(f"masked_head.dense.{kind}", f"cls.predictions.transform.dense.{kind}")
        yield same(f"masked_head.norm.{kind}", f"cls.predictions.transform.LayerNorm.{kind}")
        if config.next_sentence:
            yield same(f"next_sentence_head.pooler.{kind}", f"bert.pooler.dense.{kind}")
            # Theirs says first that a segment follows, ours that it does not.
            yield reversed_rows(f"next_sentence_head.classifier.{kind}", f"cls.seq_relationship.{kind}")
    yield vocabulary("output_bias.bias", "cls.predictions.bias", config)
