"""Best-fit packing: every sequence holds whole documents, and what does not fit is padded, not cut.

Idea (Ding et al. 2024, "Fewer Truncations Improve Language Modeling"): documents are cut only where they are longer
than a sequence; the pieces go, longest first, each into the fullest sequence that it still fits in. A sequence is

    EOD  a0 a1 EOD  b0 b1 b2 EOD  padding          inputs without the last column, labels without the first

so a piece of L tokens takes L labels, every piece begins with an EOD as its first input, and no token of the source is
lost or predicted twice in a pass. A piece that is the rest of a longer document is a segment of its own.

The sequences of a window are made once; each pass takes them in another order. Packing goes by portions of 65,536
pieces, so that its cost stays bounded: on web text 0.5 to 2 % of the labels are padding.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.mixture import permutation
from data_pipeline.samples import Samples, Window
from data_pipeline.store import Store

_PORTION = 65_536


def best_fit(lengths: NDArray[np.int64], room: int, most: int) -> NDArray[np.int64]:
    """Which bin each piece goes into.

    Args:
        lengths: Sizes of the pieces, 1 to room; [pieces].
        room: Size of a bin.
        most: Pieces in a bin, at most.

    Returns:
        Numbers of bins, 0, 1, 2 ... without gaps; [pieces].
    """
    bins = np.empty(len(lengths), dtype=np.int64)
    open_bins: list[list[int]] = [[] for _ in range(room + 1)]
    held: list[int] = []
    # The set of rooms that some bin still has, as bits: the least one that is large enough is found at once.
    rooms = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            number = open_bins[left].pop()
            if not open_bins[left]:
                rooms ^= 1 << left
        else:
            left, number = room, len(held)
            held.append(0)
        bins[piece] = number
        held[number] += 1
        left -= length
        if left and held[number] < most:
            open_bins[left].append(number)
            rooms |= 1 << left
    return bins


class Packed(Protocol):
    """The rows of one window."""

    bins: int
    labels: NDArray[np.int64]
    """Tokens of the source in each, [bins]."""


class _PackedWindow:
    """The sequences of one window."""

    def __init__(self, window: Window, length: int, most: int) -> None:
        self.window = window
        starts, lengths = window.documents()
        cuts = -(-lengths // length)
        document = np.repeat(np.arange(len(lengths)), cuts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        self._start = starts[document] + number * length
        self._length = np.minimum(lengths[document] - number * length, length)
        bins, count = [], 0
        for first in range(0, len(self._length), _PORTION):
            found = best_fit(self._length[first : first + _PORTION], length, most) + count
            bins.append(found)
            count = int(found.max()) + 1
        of_piece = np.concatenate(bins)
        self._order = np.argsort(of_piece, kind="stable")
        self._borders = np.searchsorted(of_piece[self._order], np.arange(count + 1))
        self.bins = count
        self.labels = np.add.reduceat(self._length[self._order], self._borders[:-1])
        """Labels in each sequence, [bins]."""

    def fill(self, number: int, row: NDArray[np.unsignedinteger], end_of_document: int) -> None:
        """Writes a sequence into `row`; what it does not fill is left alone."""
        pieces = self._order[self._borders[number] : self._borders[number + 1]]
        tokens = self.window.stretches(self._start[pieces], self._length[pieces])
        row[0] = end_of_document
        row[1 : 1 + len(tokens)] = tokens


class PackedStream(Samples):
    """The samples of one source and split, packed by best fit; passes without end."""

    def __init__(
        self, store: Store, source: str, *, split: str, sequence_length: int, seed: int | None, most: int | None
    ) -> None:
        """`most` documents, or pieces of them, stand in a sequence."""
        super().__init__(store, source, split=split, seed=seed)
        self._length = sequence_length
        self._most = most if most is not None else sequence_length
        self._packed: list[Packed] = []
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self.grown()

    def grown(self) -> None:
        for window in self.windows[len(self._packed) :]:
            self._packed.append(self.pack(window))
        self._ends = np.cumsum([0, *(packed.bins for packed in self._packed)])

    def pack(self, window: Window) -> Packed:
        """The rows of a window."""
        return _PackedWindow(window, self._length, self._most)

    def fill(self, packed: Any, number: int, row: NDArray[np.unsignedinteger], ordinal: int) -> None:
        """Writes one of the rows of a window, which comes as the `ordinal`-th of the source."""
        packed.fill(number, row, self.end_of_document)

    @property
    def samples_of_a_pass(self) -> int:
        return int(self._ends[-1])

    @property
    def ready(self) -> int | None:
        return None if self.final else int(self._ends[-1])

    def windows_begun(self, count: int) -> int | None:
        if count > self._ends[-1]:
            return None
        return int(np.searchsorted(self._ends, count, side="left"))

    def tokens_before(self, count: int) -> int:
        passes, rest = divmod(count, int(self._ends[-1])) if self._ends[-1] else (0, 0)
        total = passes * sum(int(packed.labels.sum()) for packed in self._packed)
        for number, packed in enumerate(self._packed):
            taken = min(max(rest - int(self._ends[number]), 0), packed.bins)
            if taken == packed.bins:
                total += int(packed.labels.sum())
            elif taken:
                total += int(packed.labels[self._order(number, passes)[:taken]].sum())
        return total

    def read(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        ids = np.zeros((len(ordinals), self._length + 1), dtype=self.dtype)
        labels = np.empty(len(ordinals), dtype=np.int64)
        passes, rests = np.divmod(ordinals, self._ends[-1])
        numbers = np.searchsorted(self._ends, rests, side="right") - 1
        for row, (epoch, number, rest) in enumerate(
            zip(passes.tolist(), numbers.tolist(), rests.tolist(), strict=True)
        ):
            packed = self._packed[number]
            chosen = int(self._order(number, epoch)[rest - self._ends[number]])
            self.fill(packed, chosen, ids[row], int(ordinals[row]))
            labels[row] = packed.labels[chosen]
        return ids, labels

    def _order(self, window: int, epoch: int) -> NDArray[np.int64]:
        """The sequences of a window in the order of a pass."""
        if (window, epoch) not in self._orders:
            while len(self._orders) > 2 * len(self._packed):
                del self._orders[next(iter(self._orders))]
            bins = self._packed[window].bins
            order = np.arange(bins)
            if self._seed is not None:
                order = permutation(bins, "bins", *self.purpose(window), epoch, self._length).astype(np.int64)
            self._orders[window, epoch] = order
        return self._orders[window, epoch]
