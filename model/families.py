"""The families, as far as they can be described without torch: one table, and what follows from it.

A family is a row: what its chunks are (its architecture, by which `model.build` finds the class), the objectives that
it is trained by, and its tables of Hugging Face names (model/hf/families.py). Nothing else asks which family a model is
of; what differs between families is a value or a function in such a row. Imports without torch, because rules are
checked before torch is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from model.config import FamilyName, ModelConfig, ObjectiveName


class Architecture(StrEnum):
    """What the layers of a family attend to, and what stands around them."""

    causal = "causal"
    """One stack in which every token sees those before it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row."""

    architecture: Architecture
    objectives: tuple[ObjectiveName, ...]
    """By which it can be trained; the first is the default."""


_CAUSAL = Family(architecture=Architecture.causal, objectives=(ObjectiveName.causal_lm,))

FAMILIES: Mapping[FamilyName, Family] = dict.fromkeys(FamilyName, _CAUSAL)

SAMPLES: Mapping[ObjectiveName, str] = {ObjectiveName.causal_lm: "causal"}
"""The form of an objective's samples: the name of a builder of data_pipeline/builders.py."""


def family(model: ModelConfig) -> Family:
    """The row of a model."""
    return FAMILIES[model.family]


def objective(model: ModelConfig, asked: ObjectiveName | None) -> ObjectiveName:
    """What a model is trained by: what was asked for, or its family's default."""
    return asked or family(model).objectives[0]
