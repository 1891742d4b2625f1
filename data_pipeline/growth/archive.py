"""The kept documents of a growing store by row, over the build that it began with and all portions since."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.dedup.shingles import shingle_sets
from data_pipeline.document import Parts


class Archive:
    """Rows are counted through: those of the build first, then portion after portion."""

    def __init__(self) -> None:
        self._parts: list[Parts] = []
        self._first: list[int] = []
        self.rows = 0

    def append(self, parts: Parts) -> int:
        """Takes in the documents of the next portion; returns the row of its first."""
        first = self.rows
        self._parts.append(parts)
        self._first.append(first)
        self.rows += parts.rows
        return first

    def ids(self, rows: NDArray[np.int64]) -> list[tuple[str, str]]:
        """(id, source) of some rows, in the order in which they are given."""
        found: list[tuple[str, str]] = [("", "")] * len(rows)
        for places, parts, local in self._split(rows):
            names = np.array(parts.sources, dtype=object)[parts.source_of_row()[local]]
            for place, identifier, source in zip(places.tolist(), parts.ids(local), names, strict=True):
                found[place] = identifier, source
        return found

    def shingles(self, rows: NDArray[np.int64], ngram: int) -> dict[int, NDArray[np.uint64]]:
        """Shingle sets of some rows; only the batches that hold one are read."""
        found: dict[int, NDArray[np.uint64]] = {}
        for places, parts, local in self._split(np.unique(rows)):
            first = int(np.unique(rows)[places[0]] - local[0])
            for group in parts.groups:
                low, high = np.searchsorted(local, (group.first_row, group.first_row + group.rows))
                if low < high:
                    texts = parts.read(group, ("text",)).column("text")
                    wanted = texts.take(pa.array(local[low:high] - group.first_row))
                    sets = shingle_sets(wanted, np.arange(len(wanted)), ngram=ngram)
                    found.update(zip((local[low:high] + first).tolist(), sets, strict=True))
        return found

    def _split(self, rows: NDArray[np.int64]) -> Sequence[tuple[NDArray[np.int64], Parts, NDArray[np.int64]]]:
        """(places in `rows`, documents, rows in them) of each portion that holds one."""
        owner = np.searchsorted(np.array(self._first), rows, side="right") - 1
        return [
            (np.flatnonzero(owner == number), self._parts[number], rows[owner == number] - self._first[number])
            for number in np.unique(owner).tolist()
        ]
