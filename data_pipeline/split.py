"""Which documents are held out for validation, and which ones the tokenizer is trained on.

Both follow from a hash of the document's id, so they are the same in every later run, whatever else is added to the
corpus. Near-duplicates are gone before, so no validation document has a near-duplicate in training.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from data_pipeline.document import Group, Mapper, Parts, map_in_order, text_buffer
from data_pipeline.progress import Meter

_FILE = "kept.parquet"
_SAMPLE_ORDER = np.uint64(0x9E3779B97F4A7C15)
"""Turns the order of the split into another one for the tokenizer's sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The documents that go into the store, ascending; all arrays [documents]."""

    row: NDArray[np.int64]
    source: NDArray[np.int16]
    text_bytes: NDArray[np.int64]
    hash: NDArray[np.uint64]
    validation: NDArray[np.bool_]

    @classmethod
    def read(cls, directory: Path) -> "Kept":
        """The table of a finished split."""
        table = pq.read_table(directory / _FILE, page_checksum_verification=True)
        return cls(**{name: table.column(name).to_numpy() for name in cls.__slots__})

    def write(self, directory: Path) -> None:
        """Puts the table into the stage's directory."""
        table = pa.table({name: pa.array(getattr(self, name)) for name in self.__slots__})
        pq.write_table(table, directory / _FILE, compression="zstd", write_page_checksum=True)


def split_documents(
    parts: Parts,
    kept: NDArray[np.bool_],
    share: float,
    directory: Path,
    meter: Meter,
    mapper: Mapper = map_in_order,
) -> dict[str, Any]:
    """Writes the table of what is kept [rows]; returns documents and bytes of each source and split."""
    hashes: list[NDArray[np.uint64]] = []
    sizes: list[NDArray[np.int64]] = []
    for group, (found, lengths) in zip(parts.groups, mapper(partial(_hash_ids, parts), parts.groups), strict=True):
        chosen = kept[group.first_row : group.first_row + group.rows]
        hashes.append(found[chosen])
        sizes.append(lengths[chosen])
        meter.advance(group.text_bytes)
    hashed = np.concatenate(hashes)
    source = parts.source_of_row()[kept]
    table = Kept(
        row=np.flatnonzero(kept),
        source=source,
        text_bytes=np.concatenate(sizes),
        hash=hashed,
        validation=held_out(hashed, source, share),
    )
    table.write(directory)
    counts: dict[str, Any] = {}
    for number, name in enumerate(parts.sources):
        here = source == number
        counts[name] = {
            split: {"documents": int(chosen.sum()), "text_bytes": int(table.text_bytes[chosen].sum())}
            for split, chosen in (("training", here & ~table.validation), ("validation", here & table.validation))
        }
    return {"sources": counts}


def held_out(hashes: NDArray[np.uint64], source: NDArray[np.int16], share: float) -> NDArray[np.bool_]:
    """Documents whose hash lies in the first `share` of all hashes.

    A source of two documents or more gives at least one to validation, and any source at least one to training.
    """
    # 2^64 as a float times a share below one half is a whole number below 2^63.
    validation = hashes < np.uint64(int(share * 2.0**64))
    for number in np.unique(source) if share > 0 else []:
        here = np.flatnonzero(source == number)
        if len(here) > 1 and not validation[here].any():
            validation[here[np.argmin(hashes[here])]] = True
        if validation[here].all():
            validation[here[np.argmax(hashes[here])]] = False
    return validation


def _hash_ids(parts: Parts, group: Group) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    batch = parts.read(group)
    ids = batch.column("id").to_pylist()
    hashes = np.array([xxhash.xxh3_64_intdigest(identifier.encode()) for identifier in ids], dtype=np.uint64)
    return hashes, np.diff(text_buffer(batch.column("text"))[1])


def budgets(sizes: Mapping[str, int], weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Bytes to take of each source: by weight, and what a small source cannot give is given by the others."""
    given = dict.fromkeys(sizes, 0)
    open_sources = {source for source in sizes if weights[source] > 0}
    while open_sources:
        left = total - sum(given.values())
        weight = sum(weights[source] for source in open_sources)
        full = {source for source in open_sources if left * weights[source] / weight >= sizes[source]}
        for source in full or open_sources:
            given[source] = sizes[source] if full else int(left * weights[source] / weight)
        if not full:
            break
        open_sources -= full
    return given


def sample_rows(kept: Kept, sources: tuple[str, ...], mixture: Mapping[str, float], total: int) -> NDArray[np.int64]:
    """Rows of training documents for the tokenizer, ascending: at most `total` bytes of text, stratified by source."""
    training = ~kept.validation
    sizes = {
        name: int(kept.text_bytes[training & (kept.source == number)].sum()) for number, name in enumerate(sources)
    }
    weights = {name: float(mixture.get(name, 0.0)) if mixture else float(sizes[name]) for name in sources}
    budget = budgets(sizes, weights, total)
    chosen = np.zeros(len(kept.row), dtype=bool)
    for number, name in enumerate(sources):
        here = np.flatnonzero(training & (kept.source == number))
        order = here[np.argsort(kept.hash[here] * _SAMPLE_ORDER, kind="stable")]
        chosen[order[np.cumsum(kept.text_bytes[order]) <= budget[name]]] = True
    return kept.row[chosen]


def sample_bytes(kept: Kept, sources: tuple[str, ...], rows: NDArray[np.int64]) -> dict[str, int]:
    """Bytes of text of some rows, by source."""
    chosen = np.isin(kept.row, rows)
    return {name: int(kept.text_bytes[chosen & (kept.source == number)].sum()) for number, name in enumerate(sources)}


def texts_of(parts: Parts, rows: NDArray[np.int64]) -> Iterator[list[tuple[str, str]]]:
    """(id, text) of ascending rows, a batch at a time."""
    for group in parts.groups:
        low, high = np.searchsorted(rows, (group.first_row, group.first_row + group.rows))
        if low < high:
            batch = parts.read(group).take(pa.array(rows[low:high] - group.first_row))
            yield list(zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True))
