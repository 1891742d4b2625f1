"""The families, as far as they can be described without torch: one table, and what follows from it.

A family is a row: what its chunks are (its architecture, by which `model.build` finds the class), the objectives that
it is trained by, and its tables of Hugging Face names (model/hf/families.py). Nothing else asks which family a model is
of; what differs between families is a value or a function in such a row. Imports without torch, because rules are
checked before torch is there.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from model.config import FamilyName, ModelConfig, Norm, NormPlacement, ObjectiveName
from parallel.common.errors import Problem


class Architecture(StrEnum):
    """What the layers of a family attend to, and what stands around them."""

    causal = "causal"
    """One stack in which every token sees those before it."""
    encoder = "encoder"
    """One stack in which every token sees its whole document."""


def no_problems(_: ModelConfig) -> Iterator[Problem]:
    """Nothing is refused."""
    yield from ()


def causal_problems(model: ModelConfig) -> Iterator[Problem]:
    """What a causal model cannot have."""
    if model.next_sentence:
        legal = f"false: a {model.family.value} sees no segment as a whole; only an encoder such as bert does"
        yield Problem(key="model.next_sentence", got=True, legal=legal)
    if model.norm_placement is NormPlacement.after:
        legal = f"before: a {model.family.value} norms what attention and MLP read; post_norms adds norms behind them"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row."""

    architecture: Architecture
    objectives: Callable[[ModelConfig], tuple[ObjectiveName, ...]]
    """By which a model can be trained; the first is the default."""
    problems: Callable[[ModelConfig], Iterator[Problem]] = no_problems
    """What such a model cannot have."""
    continues_text: bool = True
    """Whether it predicts what follows a text."""
    beside: Callable[[ModelConfig, int], int] = lambda *_: 0
    """Parameters beside blocks, norms, embeddings and output layer, from the vocabulary size."""


def _encoder_heads(model: ModelConfig, vocabulary_size: int) -> int:
    """Two segments' embeddings, the masked head with its norm, the output bias, and the next-sentence head."""
    hidden = model.hidden_size
    dense = hidden * hidden + hidden
    masked = dense + hidden * (2 if model.norm is Norm.layer else 1)
    return 2 * hidden + masked + vocabulary_size + (dense + 2 * hidden + 2 if model.next_sentence else 0)


def _encoder_objectives(model: ModelConfig) -> tuple[ObjectiveName, ...]:
    return (ObjectiveName.masked_lm_next_sentence if model.next_sentence else ObjectiveName.masked_lm,)


_CAUSAL = Family(
    architecture=Architecture.causal, objectives=lambda _: (ObjectiveName.causal_lm,), problems=causal_problems
)
_ENCODER = Family(
    architecture=Architecture.encoder,
    objectives=_encoder_objectives,
    problems=encoder_problems,
    continues_text=False,
    beside=_encoder_heads,
)

FAMILIES: Mapping[FamilyName, Family] = {**dict.fromkeys(FamilyName, _CAUSAL), FamilyName.bert: _ENCODER}

SAMPLES: dict[str, str] = {
    ObjectiveName.causal_lm: "causal",
    ObjectiveName.masked_lm: "masked",
    ObjectiveName.masked_lm_next_sentence: "pairs",
}
"""The form of an objective's samples: the name of a builder of data_pipeline/builders.py."""


def family(model: ModelConfig) -> Family:
    """The row of a model."""
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
