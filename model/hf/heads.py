"""Heads that tell classes apart, as `transformers` has them: the one of each family, and the names of the classes.

A model with such a head is its family's model without what predicts tokens; so a family needs no table of its own for
it, only what the head is called. `id2label` of a config.json names the classes by number.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from model.config import Classified
from model.hf.pairs import Pair, same


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassHead:
    """What a family calls one of its heads."""

    architecture: str
    """Name of the class in `transformers`."""
    output: str
    """Module of the last matrix."""
    bias: bool
    pooler: str | None = None
    """Module of the layer before it, where there is one."""

    def pairs(self) -> Iterator[Pair]:
        """Its tensors."""
        for kind in ("weight", "bias"):
            if self.pooler is not None:
                yield same(f"classifier.pooler.{kind}", f"{self.pooler}.{kind}")
            if kind == "weight" or self.bias:
                yield same(f"classifier.output.{kind}", f"{self.output}.{kind}")


ClassHeads = Mapping[Classified, ClassHead]


def causal(name: str, *, tokens: str | None = "score") -> ClassHeads:
    """Those of a causal family: a text's class is told at its last token, without a bias.

    Args:
        name: begins the names of its classes in `transformers`.
        tokens: module of the matrix that tells classes of tokens; None where the family has no such class.
    """
    texts = ClassHead(architecture=f"{name}ForSequenceClassification", output="score", bias=False)
    if tokens is None:
        return {Classified.texts: texts}
    return {
        Classified.texts: texts,
        Classified.tokens: ClassHead(architecture=f"{name}ForTokenClassification", output=tokens, bias=True),
    }


BERT: ClassHeads = {
    Classified.texts: ClassHead(
        architecture="BertForSequenceClassification", output="classifier", bias=True, pooler="bert.pooler.dense"
    ),
    Classified.tokens: ClassHead(architecture="BertForTokenClassification", output="classifier", bias=True),
}


def read_labels(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes by number that a `config.json` says; two where it says nothing, as `transformers` does."""
    named = found.get("id2label")
    if not named:
        return unnamed(found.get("num_labels") or 2)
    return tuple(str(name) for _, name in sorted(named.items(), key=lambda each: int(each[0])))


def written_labels(labels: tuple[str, ...]) -> dict[str, Any]:
    """The same for a `config.json`."""
    return {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def unnamed(number: int) -> tuple[str, ...]:
    """What `transformers` calls classes whose names nobody knows."""
    return tuple(f"LABEL_{each}" for each in range(number))
