"""The stage that cleans: one form for every text, and the smallest filters.

Texts become NFC; every kind of line end becomes a newline; control characters (all but tab and newline) and byte
order marks go; what is then too short or too long is dropped. Most texts are ASCII without control characters: they
are found by one look at the bytes and pass without becoming Python strings (1 GB/s; the others at about 100 MB/s).
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.config import CleanConfig
from data_pipeline.document import SCHEMA, Group, Mapper, Parts, PartWriter, map_in_order, text_buffer
from data_pipeline.progress import Meter
from data_pipeline.read import DUPLICATE_IDS
from data_pipeline.report import Tally

_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
_TO_LOOK_AT = np.ones(256, dtype=bool)
_TO_LOOK_AT[[ord("\t"), ord("\n"), *range(0x20, 0x7F)]] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaned:
    """What cleaning made of a batch."""

    batch: pa.RecordBatch
    changed: int
    """Documents whose text is another than before."""
    dropped: list[tuple[str, str, int, str]]
    """(reason, id, bytes, text) of each document that is not in the batch."""


def clean_text(text: str) -> str:
    """The one form of a text."""
    text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return text if unicodedata.is_normalized("NFC", text) else unicodedata.normalize("NFC", text)


def clean_batch(batch: pa.RecordBatch, settings: CleanConfig) -> Cleaned:
    """Cleans and filters a batch of (id, text)."""
    texts = batch.column("text")
    data, borders = text_buffer(texts)
    characters = np.diff(borders)
    changed: dict[int, bytes] = {}
    for row in _rows_to_look_at(data, borders):
        raw = data[borders[row] : borders[row + 1]].tobytes()
        text = clean_text(raw.decode())
        characters[row] = len(text)
        if (cleaned := text.encode()) != raw:
            changed[row] = cleaned
    if changed:
        texts = replaced_texts(data, borders, changed)
    short, long = characters < settings.min_characters, characters > settings.max_characters
    dropped = []
    for row in np.flatnonzero(short | long).tolist():
        limit = f"fewer than {settings.min_characters:,}" if short[row] else f"more than {settings.max_characters:,}"
        text = texts[row].as_py()
        dropped.append((f"with {limit} characters", batch.column("id")[row].as_py(), len(text.encode()), text))
    kept = pa.record_batch([batch.column("id"), texts], schema=SCHEMA)
    if dropped:
        kept = kept.filter(pa.array(~(short | long)))
    return Cleaned(batch=kept, changed=len(changed), dropped=dropped)


def clean_documents(
    read: Parts, directory: Path, settings: CleanConfig, meter: Meter, mapper: Mapper = map_in_order
) -> dict[str, Any]:
    """Cleans all batches that were read; returns counts and groups."""
    repeated = pq.read_table(read.directory / DUPLICATE_IDS).column("row").to_numpy()
    tally = Tally(read.sources)
    writer = PartWriter(directory)
    changed = dict.fromkeys(read.sources, 0)
    work = partial(_clean_group, read, settings, repeated)
    for group, cleaned in zip(read.groups, mapper(work, read.groups), strict=True):
        for reason, identifier, size, text in cleaned.dropped:
            tally.drop(group.source, reason, identifier, size, text)
        borders = text_buffer(cleaned.batch.column("text"))[1]
        tally.keep(group.source, cleaned.batch.num_rows, int(borders[-1] - borders[0]))
        changed[group.source] += cleaned.changed
        writer.write(group.source, cleaned.batch)
        meter.advance(group.text_bytes)
    return {"counts": tally.to_json(), "changed": changed, "groups": writer.close()}


def _clean_group(read: Parts, settings: CleanConfig, repeated: NDArray[np.int64], group: Group) -> Cleaned:
    batch = read.read(group)
    low, high = np.searchsorted(repeated, (group.first_row, group.first_row + group.rows))
    if low < high:
        ids = batch.column("id").to_pylist()
        for row in repeated[low:high].tolist():
            ids[row - group.first_row] += f"~{row}"
        batch = pa.record_batch([pa.array(ids, pa.large_string()), batch.column("text")], schema=SCHEMA)
    return clean_batch(batch, settings)


def _rows_to_look_at(data: NDArray[np.uint8], borders: NDArray[np.int64]) -> list[int]:
    """Rows with a byte beyond printable ASCII, tab and newline."""
    first = int(borders[0])
    places = np.flatnonzero(_TO_LOOK_AT[data[first : borders[-1]]]) + first
    return np.unique(np.searchsorted(borders, places, side="right") - 1).tolist()


def replaced_texts(data: NDArray[np.uint8], borders: NDArray[np.int64], changed: dict[int, bytes]) -> pa.Array:
    """The texts with some rows exchanged."""
    pieces: list[Any] = []
    lengths = np.diff(borders)
    start = 0
    for row, text in changed.items():
        pieces += [data[borders[start] : borders[row]], text]
        lengths[row] = len(text)
        start = row + 1
    pieces.append(data[borders[start] : borders[-1]])
    offsets = np.zeros(len(borders), dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.Array.from_buffers(
        pa.large_string(), len(lengths), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(pieces))]
    )
