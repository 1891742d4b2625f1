"""The families, as far as they can be described without torch: one table, and what follows from it.

A family is a row: what its chunks are (its architecture, by which `model.build` finds the class), the objectives that
it is trained by, and its tables of Hugging Face names (model/hf/families.py). Nothing else asks which family a model is
of; what differs between families is a value or a function in such a row. Imports without torch, because rules are
checked before torch is there.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

from model.config import Classified, FamilyName, ModelConfig, Norm, NormPlacement, ObjectiveName, Position
from model.projections import has_adapter
from parallel.common.errors import ConfigError, Problem


class Architecture(StrEnum):
    """What the layers of a family attend to, and what stands around them."""

    causal = "causal"
    """One stack in which every token sees those before it."""
    encoder = "encoder"
    """One stack in which every token sees its whole document."""
    encoder_decoder = "encoder_decoder"
    """Such a stack, and one that is causal and sees what the first one gives."""


def no_problems(_: ModelConfig) -> Iterator[Problem]:
    """Nothing is refused."""
    yield from ()


def causal_problems(model: ModelConfig) -> Iterator[Problem]:
    """What a causal model cannot have."""
    yield from _no_decoder(model)
    if model.next_sentence:
        legal = f"false: a {model.family} sees no segment as a whole; only an encoder such as bert does"
        yield Problem(key="model.next_sentence", got=True, legal=legal)
    if model.norm_placement is NormPlacement.after:
        legal = f"before: a {model.family} norms what attention and MLP read; post_norms adds norms behind them"
        yield Problem(key="model.norm_placement", got=model.norm_placement.value, legal=legal)


def encoder_problems(model: ModelConfig) -> Iterator[Problem]:
    """What an encoder cannot have."""
    if model.sliding_window is not None:
        legal = "null: an encoder attends to its whole document"
        yield Problem(key="model.sliding_window", got=model.sliding_window, legal=legal)
    if model.attention_softcap is not None:
        legal = "null: an encoder's attention runs through kernels that cap no scores"
        yield Problem(key="model.attention_softcap", got=model.attention_softcap, legal=legal)
    if model.latent.kv_rank is not None:
        yield Problem(key="model.latent.kv_rank", got=model.latent.kv_rank, legal="null: only causal families have it")
    if model.parallel_residual:
        yield Problem(key="model.parallel_residual", got=True, legal="false: only causal families have it")
    if model.moe.experts:
        yield Problem(key="model.moe.experts", got=model.moe.experts, legal="0: an encoder has an MLP in each block")


def encoder_decoder_problems(model: ModelConfig) -> Iterator[Problem]:
    """What an encoder with a decoder cannot have."""
    yield from encoder_problems(model)
    if model.classes.number:
        legal = "0: a decoder tells a class as a text (train.objective=seq2seq)"
        yield Problem(key="model.classes.number", got=model.classes.number, legal=legal)
    if model.decoder_layers is None or model.decoder_layers < 1:
        legal = "1 or more, the blocks behind the encoder of model.layers"
        yield Problem(key="model.decoder_layers", got=model.decoder_layers, legal=legal)
    if model.position is not Position.relative:
        legal = "relative: positions are told by distance in both stacks"
        yield Problem(key="model.position", got=model.position.value, legal=legal)
    if model.kv_heads not in (None, model.heads):
        legal = f"null or model.heads = {model.heads}: cross attention has a key for each query head"
        yield Problem(key="model.kv_heads", got=model.kv_heads, legal=legal)
    for name in ("next_sentence", "linear_bias", "attention_bias", "qk_norm", "post_norms", "scale_embeddings"):
        if getattr(model, name):
            yield Problem(key=f"model.{name}", got=True, legal=f"false: a {model.family} has none of it")
    if model.norm is not Norm.rms or model.norm_placement is not NormPlacement.before:
        legal = "rms, with model.norm_placement=before"
        yield Problem(key="model.norm", got=model.norm.value, legal=legal)


def _no_decoder(model: ModelConfig) -> Iterator[Problem]:
    if model.decoder_layers is not None:
        legal = f"null: a {model.family} has one stack"
        yield Problem(key="model.decoder_layers", got=model.decoder_layers, legal=legal)
    if model.position is Position.relative:
        legal = "rope or learned: relative positions belong to a model of two stacks, such as t5"
        yield Problem(key="model.position", got=model.position.value, legal=legal)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row."""

    architecture: Architecture
    objectives: Callable[[ModelConfig], tuple[ObjectiveName, ...]]
    """By which a model can be trained; the first is the default."""
    problems: Callable[[ModelConfig], Iterator[Problem]] = no_problems
    """What such a model cannot have."""
    beside: Callable[[ModelConfig, int], int] = lambda *_: 0
    """Parameters beside blocks, norms, embeddings and output layer, from the vocabulary size."""


def _classifier(model: ModelConfig, *, bias: bool) -> int:
    return model.classes.number * (model.hidden_size + bias)


def _causal_head(model: ModelConfig, _: int) -> int:
    return _classifier(model, bias=model.classes.of is Classified.tokens)


def _encoder_heads(model: ModelConfig, vocabulary_size: int) -> int:
    """Two segments' embeddings, the masked head with its norm, the output bias, and the next-sentence head."""
    hidden = model.hidden_size
    dense = hidden * hidden + hidden
    if model.classes.number:
        return 2 * hidden + (dense if model.classes.of is Classified.texts else 0) + _classifier(model, bias=True)
    masked = dense + hidden * (2 if model.norm is Norm.layer else 1)
    return 2 * hidden + masked + vocabulary_size + (dense + 2 * hidden + 2 if model.next_sentence else 0)


def _decoder(model: ModelConfig, vocabulary_size: int) -> int:
    """The decoder's blocks with their cross attention and norms, its last norm, and two tables of positions."""
    assert model.decoder_layers is not None
    hidden, heads = model.hidden_size, model.heads
    attention = 4 * hidden * heads * (model.head_size or hidden // heads)
    matrices = 2 * attention + (3 if model.activation.gated else 2) * hidden * model.ffn_hidden_size
    return model.decoder_layers * (matrices + 3 * hidden) + hidden + 2 * model.relative_buckets * heads


def _encoder_objectives(model: ModelConfig) -> tuple[ObjectiveName, ...]:
    if model.classes.number:
        return (ObjectiveName.classification,)
    return (ObjectiveName.masked_lm_next_sentence if model.next_sentence else ObjectiveName.masked_lm,)


def _causal_objectives(model: ModelConfig) -> tuple[ObjectiveName, ...]:
    if model.classes.number:
        return (ObjectiveName.classification,)
    return ObjectiveName.causal_lm, ObjectiveName.prefix_lm, ObjectiveName.answers


CAUSAL = Family(
    architecture=Architecture.causal, objectives=_causal_objectives, problems=causal_problems, beside=_causal_head
)
ENCODER = Family(
    architecture=Architecture.encoder,
    objectives=_encoder_objectives,
    problems=lambda model: chain(_no_decoder(model), encoder_problems(model)),
    beside=_encoder_heads,
)

ENCODER_DECODER = Family(
    architecture=Architecture.encoder_decoder,
    objectives=lambda _: (ObjectiveName.span_corruption, ObjectiveName.seq2seq),
    problems=encoder_decoder_problems,
    beside=_decoder,
)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(FamilyName, CAUSAL),
    FamilyName.bert: ENCODER,
    FamilyName.t5: ENCODER_DECODER,
}

SAMPLES: dict[str, str] = {
    ObjectiveName.causal_lm: "causal",
    ObjectiveName.prefix_lm: "prefix",
    ObjectiveName.masked_lm: "masked",
    ObjectiveName.masked_lm_next_sentence: "pairs",
    ObjectiveName.span_corruption: "spans",
    ObjectiveName.answers: "answers",
    ObjectiveName.seq2seq: "targets",
    ObjectiveName.classification: "classes",
}
"""The form of an objective's samples: a name in data_pipeline/forms.py."""


def unknown(model: ModelConfig) -> Iterator[Problem]:
    """A family that is nowhere."""
    if model.family not in FAMILIES:
        near = difflib.get_close_matches(model.family, FAMILIES, n=1)
        legal = (
            f"{near[0]}, if that was meant" if near else f"one of {', '.join(FAMILIES)}, or one that a plugin registers"
        )
        yield Problem(key="model.family", got=model.family, legal=legal)


def family(model: ModelConfig) -> Family:
    """The row of a model.

    Raises:
        ConfigError: there is none.
    """
    if problems := list(unknown(model)):
        raise ConfigError(problems)
    return FAMILIES[model.family]


OWN: dict[str, Architecture] = {}
"""Objectives of plugins, with the architecture whose outputs they read (`model.objectives.register_objective`)."""


def objectives(model: ModelConfig) -> tuple[str, ...]:
    """By what a model can be trained; the first is the default."""
    row = family(model)
    return (*row.objectives(model), *(name for name, architecture in OWN.items() if architecture is row.architecture))


def objective(model: ModelConfig, asked: str | None) -> str:
    """What a model is trained by: what was asked for, or its family's default."""
    return asked or objectives(model)[0]


def form(model: ModelConfig, asked: str | None) -> str:
    """The form of the samples that a model is trained on; a text that is read from both sides has one of its own."""
    found = SAMPLES[objective(model, asked)]
    return f"encoder_{found}" if found == "classes" and family(model).architecture is Architecture.encoder else found


def before_classes(name: str) -> str:
    """What a parameter is called in the model that has no head for classes yet: a text's pooler is that of BERT's next
    sentences, where it learnt them, as in `transformers`."""
    return name.replace("classifier.pooler.", "next_sentence_head.pooler.")


_HEADS = ("output_layer.", "masked_head.", "output_bias.", "next_sentence_head.", "classifier.")


def begins_anew(model: ModelConfig, name: str) -> bool:
    """Whether a parameter is one that fine-tuning may begin with its initial value, or leave behind: of a head, where
    the model gets one for classes, and of the model's adapters. With adapters nothing else is trained."""
    return has_adapter(model, name) or (bool(model.classes.number) and name.startswith(_HEADS))
