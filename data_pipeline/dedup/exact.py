"""Exact deduplication: of documents with the same normalised text one is kept.

Texts are told apart by xxh3-128; kept is the one of the earliest source, then with the smallest id. Memory is 16 bytes
a document.
"""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from data_pipeline.dedup.removed import Removal, count_removed
from data_pipeline.document import Group, Mapper, Parts, map_in_order, save_array, text_buffer
from data_pipeline.progress import Meter

REASON = "with the text of another"
DIGESTS = "digests.npy"
"""xxh3-128 of every text, uint64 [rows, 2]: what is added later is compared with it."""


def hash_texts(texts: pa.Array) -> NDArray[np.uint64]:
    """xxh3-128 of each text, high and low half; [texts, 2]."""
    data, borders = text_buffer(texts)
    view = memoryview(data)
    ends = borders.tolist()
    joined = b"".join(xxhash.xxh3_128_digest(view[start:stop]) for start, stop in pairwise(ends))
    return np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)


def deduplicate_exactly(
    parts: Parts,
    directory: Path,
    meter: Meter,
    mapper: Mapper = map_in_order,
    came_in: NDArray[np.bool_] | None = None,
) -> dict[str, Any]:
    """Writes which documents are removed of the rows that `came_in` (by default all); returns the counts."""
    came_in = np.ones(parts.rows, dtype=bool) if came_in is None else came_in
    halves = np.empty((parts.rows, 2), dtype=np.uint64)
    sizes = np.empty(parts.rows, dtype=np.int64)
    for group, (hashes, lengths) in zip(parts.groups, mapper(partial(_hash, parts), parts.groups), strict=True):
        rows = slice(group.first_row, group.first_row + group.rows)
        halves[rows], sizes[rows] = hashes, lengths
        meter.advance(group.text_bytes)
    removed, twins = _repetitions(parts, halves, np.flatnonzero(came_in))
    removal = Removal(row=removed, kept_row=twins, jaccard=np.ones(len(removed)))
    removal.write(directory)
    save_array(directory / DIGESTS, halves)
    return {"counts": count_removed(parts, came_in, sizes, removal, REASON)}


def _hash(parts: Parts, group: Group) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    texts = parts.read(group, ("text",)).column("text")
    return hash_texts(texts), np.diff(text_buffer(texts)[1])


def _repetitions(
    parts: Parts, halves: NDArray[np.uint64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to remove of those given, ascending, and for each the row that is kept for it."""
    order = rows[np.lexsort((halves[rows, 1], halves[rows, 0]))]
    same = np.all(halves[order[1:]] == halves[order[:-1]], axis=1)
    # A run of equal texts lies between two places where neighbours differ.
    borders = np.flatnonzero(np.concatenate(([True], ~same, [True])))
    runs = [order[start:stop] for start, stop in pairwise(borders) if stop - start > 1]
    if not runs:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    members = np.concatenate(runs)
    sources = parts.source_of_row()[members].tolist()
    ids = parts.ids(members)
    ranked = sorted(range(len(members)), key=lambda place: (sources[place], ids[place], members[place]))
    rank = np.empty(len(members), dtype=np.int64)
    rank[ranked] = np.arange(len(members))
    kept = np.empty(len(members), dtype=np.int64)
    start = 0
    for run in runs:
        stop = start + len(run)
        kept[start:stop] = run[np.argmin(rank[start:stop])]
        start = stop
    removed = members != kept
    ascending = np.argsort(members[removed])
    return members[removed][ascending], kept[removed][ascending]
