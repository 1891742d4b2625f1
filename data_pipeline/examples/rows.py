"""Samples of an example store: rows of whole examples, each seen by itself, and what of them counts.

    in the store   p0 p1 BEGIN a0 a1 END EOD
    answers        tokens  EOD p0 p1 a0 a1      one stack: what it is to say, from all before it
                   labels  p0  p1 a0 a1 EOD
                   weights 0   0  1  1  1       the end counts where an answer stands before it
    targets        encoder p0 p1 EOD            two stacks: the decoder tells all that stands between marks
                   tokens  PAD a0 a1
                   labels  a0  a1 EOD
    classes        tokens  EOD p0 p1            a class of the text at its last token, a class of each at its place
    in an encoder  tokens  FIRST p0 p1 SEP      a class of the text at its first token

Rows are packed by best fit; positions, attention and documents end with an example. One that is longer than a row is
left out: half of an answer teaches to stop in the middle.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Rows
from data_pipeline.examples.kinds import BEGIN, BORDER, END, Facts, Kind, facts_of
from data_pipeline.marks import marks
from data_pipeline.packing import PackedStream, best_fit
from data_pipeline.sample_builder import SampleBuilder, Setting
from data_pipeline.samples import Samples, Window
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import UserError

logger = logging.getLogger(__name__)
Ids = NDArray[np.int64]


class _ExampleWindow:
    """The rows of one window: whole documents, `room` tokens at most together."""

    def __init__(self, window: Window, room: int) -> None:
        starts, lengths = window.documents()
        self._window = window
        self.fitting = np.flatnonzero(lengths <= room)
        self.documents = len(lengths)
        self._starts, self._lengths = starts[self.fitting], lengths[self.fitting]
        of_piece = best_fit(self._lengths, room, room) if len(self.fitting) else np.zeros(0, dtype=np.int64)
        self.bins = int(of_piece.max(initial=-1)) + 1
        self._order = np.argsort(of_piece, kind="stable")
        self._borders = np.searchsorted(of_piece[self._order], np.arange(self.bins + 1))
        self.labels = np.bincount(of_piece, weights=self._lengths, minlength=self.bins).astype(np.int64)
        """Tokens of each row, [bins]."""

    def fill(self, number: int, row: NDArray[np.unsignedinteger], border: int) -> None:
        """Writes a row; the end of each of its documents becomes a border."""
        pieces = self._order[self._borders[number] : self._borders[number + 1]]
        lengths = self._lengths[pieces]
        tokens = self._window.stretches(self._starts[pieces], lengths)
        tokens[np.cumsum(lengths) - 1] = border
        row[: len(tokens)] = tokens


class ExampleStream(PackedStream):
    """The examples of one source and split; passes without end."""

    def __init__(
        self, store: Store, source: str, *, split: str, sequence_length: int, seed: int | None, border: int
    ) -> None:
        self._border = border
        super().__init__(store, source, split=split, sequence_length=sequence_length, seed=seed, most=None)
        left_out = sum(window.documents - len(window.fitting) for window in self._packed)  # type: ignore[attr-defined]
        if self.final and not self.samples_of_a_pass:
            raise UserError(f"no {split} example of {source} fits train.sequence_length = {sequence_length}: raise it")
        if left_out:
            logger.warning(
                "%d %s examples of %s are longer than train.sequence_length = %d, and are left out",
                left_out, split, source, sequence_length,
            )  # fmt: skip

    def pack(self, window: Window) -> _ExampleWindow:
        return _ExampleWindow(window, self._length)

    def fill(self, packed: _ExampleWindow, number: int, row: NDArray[np.unsignedinteger], ordinal: int) -> None:
        packed.fill(number, row, self._border)


class Example(NamedTuple):
    """One document of a row."""

    tokens: Ids
    """Without marks and end."""
    learnt: NDArray[np.bool_]
    """[tokens]: what stood between marks."""
    ends: bool
    """Whether the last of them did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a builder makes of an example: a stretch of a row. All [length]."""

    tokens: Ids
    labels: Ids
    weights: NDArray[np.bool_]


class Examples(SampleBuilder):
    """Rows of examples; a subclass says what one becomes."""

    kinds: tuple[Kind, ...] = (Kind.answers,)

    def __init__(self, setting: Setting) -> None:
        store = setting.store
        self.facts: Facts = facts_of(store, *self.kinds)
        ids = Tokenizer.load(store.tokenizer).ids()
        self._begin, self._finish, self._border = ids[BEGIN], ids[END], ids[BORDER]
        self.setting = setting
        self.length = setting.sequence_length
        self.end, self.padding = store.end_of_document, store.padding

    def stream(self, store: Store, source: str, *, split: str, seed: int | None) -> Samples:
        return ExampleStream(store, source, split=split, sequence_length=self.length, seed=seed, border=self._border)

    def part(self, example: Example) -> Part:
        """What an example becomes, at most one token longer than it with its end."""
        raise NotImplementedError

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        parts = [[self.part(example) for example in row] for row in self.examples(rows)]
        return laid_out(parts, self.length, self.padding) | {"sample_ids": torch.from_numpy(rows.sample_ids)}

    def examples(self, rows: Rows) -> Iterator[list[Example]]:
        """The examples of each row as it stands in `ExampleStream`."""
        for row, count in zip(rows.ids, rows.labels_in_row.tolist(), strict=True):
            yield self._examples(row[:count].astype(np.int64))

    def _examples(self, row: Ids) -> list[Example]:
        borders = np.flatnonzero(row == self._border)
        return [self._example(document[document != self._border]) for document in np.split(row, borders + 1)[:-1]]

    def _example(self, document: Ids) -> Example:
        opened, closed = document == self._begin, document == self._finish
        inside = (np.cumsum(opened) - np.cumsum(closed)).astype(np.bool_)
        text = ~(opened | closed)
        return Example(tokens=document[text], learnt=inside[text], ends=bool(closed[-1]))


def laid_out(rows: list[list[Part]], length: int, padding: int) -> dict[str, Tensor]:
    """The fields of a batch that rows of parts make; behind the last one stands padding, a document of its own."""
    shape = (len(rows), length)
    found = {
        "tokens": np.full(shape, padding, dtype=np.int64),
        "labels": np.full(shape, padding, dtype=np.int64),
        "loss_weights": np.zeros(shape, dtype=np.float32),
        "positions": np.zeros(shape, dtype=np.int64),
        "document_ids": np.zeros(shape, dtype=np.int32),
    }
    for row, parts in enumerate(rows):
        ends = np.cumsum([len(part.tokens) for part in parts], dtype=np.int64)
        for number, (part, end) in enumerate(zip(parts, ends.tolist(), strict=True)):
            place = (row, slice(end - len(part.tokens), end))
            found["tokens"][place], found["labels"][place] = part.tokens, part.labels
            found["loss_weights"][place] = part.weights
            found["positions"][place] = np.arange(len(part.tokens))
            found["document_ids"][place] = number
        last = int(ends[-1]) if parts else 0
        found["document_ids"][row, last:] = len(parts)
        found["positions"][row, last:] = np.arange(length - last)
    return {name: torch.from_numpy(array) for name, array in found.items()}


class Answers(Examples):
    """What one stack is to say."""

    def part(self, example: Example) -> Part:
        return Part(
            tokens=np.append(self.end, example.tokens),
            labels=np.append(example.tokens, self.end),
            weights=np.append(example.learnt, example.ends),
        )


class Targets(Examples):
    """What a decoder is to tell of what its encoder reads; its rows are as long as the encoder's."""

    def part(self, example: Example) -> Part:
        told = example.tokens[example.learnt]
        return Part(
            tokens=np.append(self.padding, told),
            labels=np.append(told, self.end),
            weights=np.ones(len(told) + 1, dtype=np.bool_),
        )

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        encoder = laid_out(
            [[self._read(example) for example in row] for row in self.examples(rows)], self.length, self.padding
        )
        return super().batch(rows) | {
            "encoder_tokens": encoder["tokens"],
            "encoder_document_ids": encoder["document_ids"],
        }

    def _read(self, example: Example) -> Part:
        """What the encoder reads: what is not to be told, and an end."""
        read = np.append(example.tokens[~example.learnt], self.end)
        return Part(tokens=read, labels=read, weights=np.zeros(len(read), dtype=np.bool_))


class Classes(Examples):
    """Classes of texts, or of their tokens, for a model in which a token sees those before it."""

    kinds = (Kind.text_classes, Kind.token_classes)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        known = marks(setting.store)
        self._number = np.full(setting.store.vocabulary_size, -1, dtype=np.int64)
        self._number[known.ordinary] = np.arange(len(known.ordinary))
        self.before: Ids = np.array([self.end])
        self.behind: Ids = np.array([], dtype=np.int64)
        self.first = False

    def part(self, example: Example) -> Part:
        text, classes = example.tokens[~example.learnt], self._number[example.tokens[example.learnt]]
        tokens = np.concatenate([self.before, text, self.behind])
        labels, weights = np.zeros(len(tokens), dtype=np.int64), np.zeros(len(tokens), dtype=np.bool_)
        if self.facts.kind is Kind.text_classes:
            place = 0 if self.first else len(tokens) - 1
            labels[place], weights[place] = classes[0], True
        else:
            places = slice(len(self.before), len(self.before) + len(text))
            labels[places], weights[places] = np.maximum(classes, 0), classes >= 0
        return Part(tokens=tokens, labels=labels, weights=weights)


class EncoderClasses(Classes):
    """The same for an encoder: as BERT reads a text."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        known = marks(setting.store)
        self.before, self.behind, self.first = np.array([known.first]), np.array([known.separator]), True
