"""Where an import reads from: tensors by the names that another program gave them.

A source says which tensors there are and of which kinds (the weight, perhaps both moments of AdamW), and reads one at
a time. What they mean is a list of pairs (`model.hf.pairs`), and what the model is a `ModelConfig`; together they are
all that an import needs to know of a format.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from model.config import ModelConfig
from model.hf.pairs import Pair
from parallel.common.errors import UserError
from parallel.updater import Kind


class Source(Protocol):
    """Tensors of a checkpoint of another program."""

    kinds: tuple[Kind, ...]
    """What there is of every tensor."""
    steps: int | None
    """Steps that the moments stand for, where they are there."""

    @property
    def names(self) -> set[str]:
        """All tensors that are weights."""
        ...

    def shape(self, name: str) -> Sequence[int]:
        """Known without reading the tensor."""
        ...

    def read(self, name: str, kind: Kind = Kind.weight) -> Tensor:
        """A whole tensor, float32 on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """A model of another program, understood."""

    source: Source
    model: ModelConfig
    pairs: list[Pair]
    labels: tuple[str, ...] = ()
    """Names of the classes, where it tells classes apart."""
    tokenizer: Tokenizer | None = None
    reference: Callable[[], Any] | None = None
    """Makes the model of `transformers` with these weights, float32; None where there is none to compare with."""


class SafetensorsFiles:
    """The tensors of a directory of safetensors, by name."""

    kinds: tuple[Kind, ...] = (Kind.weight,)
    steps: int | None = None

    def __init__(self, directory: Path, old_names: Mapping[str, str]) -> None:
        """`old_names`: ends of names that are read as others."""
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            pickled = sorted(path.name for path in directory.glob("*.bin"))
            hint = f": {pickled[0]} would run code when it is read; convert it to safetensors first" if pickled else ""
            raise UserError(f"{directory} has no *.safetensors{hint}.")
        self._files = {_today(name, old_names): (file, name) for file in files for name in self._names(file)}

    @staticmethod
    def _names(file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as content:
                return list(content.keys())
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: it cannot be read as safetensors ({error}).") from None

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> Sequence[int]:
        file, stored = self._files[name]
        with safe_open(file, framework="pt") as content:
            return content.get_slice(stored).get_shape()

    def read(self, name: str, kind: Kind = Kind.weight) -> Tensor:
        assert kind is Kind.weight
        file, stored = self._files[name]
        with safe_open(file, framework="pt") as content:
            return content.get_tensor(stored).to(torch.float32, copy=True)  # nothing keeps the file's mapping


def _today(name: str, old_names: Mapping[str, str]) -> str:
    for old, new in old_names.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def without_prefix(pairs: list[Pair], prefix: str) -> list[Pair]:
    """The same pairs for files that hold a model without its head."""
    return [replace(pair, theirs=tuple(part.removeprefix(prefix) for part in pair.theirs)) for pair in pairs]
