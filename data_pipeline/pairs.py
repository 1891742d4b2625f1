"""Pairs of segments for next-sentence prediction, aware of documents.

    FIRST a0 a1 a2 SEP a3 a4 a5 a6 SEP padding       follows: one stretch of a document, cut at a random place
    FIRST a0 a1 a2 SEP b0 b1 b2 b3 SEP padding       does not: the second segment is the beginning of a piece of another
      0   0  0  0   0   1  1  1  1   1   0           segment ids     document, as long as what it stands for, or shorter

A document is cut into pieces that fill a row; each piece is a sample once a pass, in an order of its own. Half of the
pairs follow. What of a piece an alien segment displaces is not seen in that pass (Devlin et al. put it back: with a
corpus that is passed over more than once it comes anyway). Pieces of a single token make no pair and are left out.
Both segments are one document to attention; padding is another one.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Rows
from data_pipeline.marks import marks
from data_pipeline.masking import Masking, cover_rows, shares
from data_pipeline.packing import PackedStream
from data_pipeline.sample_builder import SampleBuilder, Setting
from data_pipeline.samples import Samples, Window
from data_pipeline.store import Store
from parallel.common.errors import UserError

_MARKS = 3


class _PieceWindow:
    """The pieces of one window: a row holds a piece, and behind it one of another document, each padded."""

    def __init__(self, window: Window, room: int, padding: int) -> None:
        self.window = window
        self._room = room
        self._padding = padding
        starts, lengths = window.documents()
        lengths = lengths - 1  # without the end of the document
        cuts = -(-lengths // room)
        document = np.repeat(np.arange(len(lengths)), cuts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        length = np.minimum(lengths[document] - number * room, room)
        kept = length > 1
        self._start = (starts[document] + number * room)[kept]
        self.labels = length[kept]
        """Tokens of each piece, [pieces]."""
        document = document[kept]
        self.bins = len(document)
        self._first = np.searchsorted(document, document, side="left")
        self._end = np.searchsorted(document, document, side="right")

    def fill(self, number: int, row: NDArray[np.unsignedinteger], draw: float) -> None:
        """Writes a piece, and one of another document that `draw` chooses; nothing where there is only one document."""
        row[:] = self._padding
        self._write(number, row[: self._room])
        first, end = int(self._first[number]), int(self._end[number])
        others = self.bins - (end - first)
        if others:
            chosen = int(draw * others)
            self._write(chosen if chosen < first else chosen + end - first, row[self._room : 2 * self._room])

    def _write(self, number: int, place: NDArray[np.unsignedinteger]) -> None:
        length = self.labels[number : number + 1]
        place[: int(length[0])] = self.window.stretches(self._start[number : number + 1], length)


class PieceStream(PackedStream):
    """The pieces of one source and split; passes without end."""

    def __init__(self, store: Store, source: str, *, split: str, sequence_length: int, seed: int | None) -> None:
        """`sequence_length` is that of a row of pairs."""
        self._room = sequence_length - _MARKS
        self._padding = store.padding
        super().__init__(store, source, split=split, sequence_length=2 * self._room, seed=seed, most=None)
        if self.final and not self.samples_of_a_pass:
            raise UserError(f"no {split} document of the source {source} has two tokens, of which a pair could be made")

    def pack(self, window: Window) -> _PieceWindow:
        return _PieceWindow(window, self._room, self._padding)

    def fill(self, packed: _PieceWindow, number: int, row: NDArray[np.unsignedinteger], ordinal: int) -> None:
        draw = float(shares(1, "other document", self._seed or 0, self._split, self.name, ordinal)[0])
        packed.fill(number, row, draw)


class Pairs(SampleBuilder):
    """Rows of pairs, some of whose tokens are covered."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._marks = marks(setting.store)
        self._masking = Masking(self._marks, setting.masking, seed=setting.seed)
        self._room = setting.sequence_length - _MARKS
        self.length = 2 * self._room

    def stream(self, store: Store, source: str, *, split: str, seed: int | None) -> Samples:
        return PieceStream(store, source, split=split, sequence_length=self._setting.sequence_length, seed=seed)

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        count, length = len(rows.ids), self._setting.sequence_length
        tokens = np.full((count, length), self._setting.store.padding, dtype=np.int64)
        segments = np.zeros((count, length), dtype=np.int64)
        document_ids = np.ones((count, length), dtype=np.int32)
        follows, counts = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.float32)
        for row in np.flatnonzero(rows.sample_ids >= 0).tolist():
            first, second, follows[row] = self._pair(
                rows.ids[row], int(rows.labels_in_row[row]), int(rows.sample_ids[row])
            )
            border, end = len(first) + 2, len(first) + len(second) + _MARKS
            tokens[row, :end] = [
                self._marks.first, *first, self._marks.separator, *second, self._marks.separator
            ]  # fmt: skip
            segments[row, border:end] = 1
            document_ids[row, :end] = 0
            counts[row] = 1
        positions = np.tile(np.arange(length), (count, 1))
        arrays = {
            "positions": positions,
            "document_ids": document_ids,
            "sample_ids": rows.sample_ids,
            "segment_ids": segments,
            "next_sentence": follows,
            "next_sentence_weights": counts,
        }
        return cover_rows(self._masking, tokens, rows.sample_ids) | {
            name: torch.from_numpy(array) for name, array in arrays.items()
        }

    def _pair(self, ids: NDArray[np.unsignedinteger], length: int, sample: int) -> tuple[list[int], list[int], bool]:
        """Two segments, and whether the second one follows the first."""
        place, kind = shares(2, "pairs", self._setting.seed, sample).tolist()
        piece, other = ids[:length].tolist(), ids[self._room : 2 * self._room]
        other = other[other != self._setting.store.padding].tolist()
        cut = 1 + int(place * (length - 1))
        if kind < 0.5 or not other:
            return piece[:cut], piece[cut:], True
        return piece[:cut], other[: length - cut], False
