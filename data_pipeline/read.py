"""The stage that reads: files of every source to batches of documents.

Besides the batches it leaves the rows whose id was seen before in the same source (the next stage gives them an id of
their own, so that no document is lost) and a digest of all ids and texts, on which the later stages' fingerprints
stand: files that were copied or touched but hold the same documents change nothing.
"""

import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from data_pipeline.config import SourceConfig, SourceFormat
from data_pipeline.document import BATCH_BYTES, PartWriter, batch_of
from data_pipeline.hub import find_dataset, read_dataset
from data_pipeline.progress import Meter
from data_pipeline.readers import EMPTY, read_file
from data_pipeline.reading import Reading
from data_pipeline.report import Tally
from data_pipeline.sources import SourceFiles, find_files

DUPLICATE_IDS = "duplicate_ids.parquet"
_EXPANSION = 6
"""Text in a byte of a compressed file, at most as a rule; for the estimate of disk space."""
_FULL = 0.01
"""Share of `limit_bytes` that may be left when the next file of a tree is not looked for any more."""


class Digest:
    """xxh3-128 of the documents of all sources, in order."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def add(self, source: str, identifier: str, text: bytes) -> None:
        """Adds one document; borders between its parts count."""
        name = identifier.encode()
        self._digest.update(f"{source}\0{len(name)}\0{len(text)}\0".encode())
        self._digest.update(name)
        self._digest.update(text)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def find_source(config: SourceConfig) -> SourceFiles:
    """The files of a source, or of the split of a Hugging Face dataset.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    return find_dataset(config) if config.format is SourceFormat.datasets else find_files(config)


def expected_bytes(sources: Sequence[SourceFiles]) -> int:
    """Text that the files will give, about; of files on the Hub, whose sizes are not known, their limit."""
    total = 0
    for source in sources:
        size = sum(file.bytes * (_EXPANSION if file.compression else 1) for file in source.files)
        limit = source.config.limit_bytes or size
        total += min(size or limit, limit)
    return total


def read_sources(sources: Sequence[SourceFiles], directory: Path, meter: Meter) -> dict[str, Any]:
    """Writes the batches of all sources; returns counts, groups and the digest."""
    tally = Tally(source.config.name for source in sources)
    digest = Digest()
    writer = PartWriter(directory)
    repeated: list[NDArray[np.int64]] = []
    replaced: dict[str, dict[str, int]] = {}
    fields: dict[str, list[str]] = {}
    left_out: dict[str, int] = {}
    row = 0
    for source in sources:
        name = source.config.name
        reading = Reading(config=source.config, tally=tally)
        hashes = array("Q")
        ids: list[str] = []
        texts: list[str] = []
        held = 0
        for identifier, text, raw in documents(source, reading):
            digest.add(name, identifier, raw)
            hashes.append(xxhash.xxh3_64_intdigest(identifier.encode()))
            ids.append(identifier)
            texts.append(text)
            held += len(raw)
            if held >= BATCH_BYTES:
                writer.write(name, batch_of(ids, texts))
                meter.advance(held)
                ids, texts, held = [], [], 0
        writer.write(name, batch_of(ids, texts))
        repeated.append(_repeated(hashes) + row)
        row += len(hashes)
        if reading.replaced_documents:
            replaced[name] = {"documents": reading.replaced_documents, "characters": reading.replaced_characters}
        if reading.fields_seen:
            fields[name] = sorted(reading.fields_seen)
        if reading.left_out_files:
            left_out[name] = reading.left_out_files
    groups = writer.close()
    rows = np.concatenate(repeated)
    pq.write_table(pa.table({"row": pa.array(rows)}), directory / DUPLICATE_IDS)
    return {
        "counts": tally.to_json(),
        "files": {source.config.name: len(source.files) for source in sources},
        "passed_over": {source.config.name: source.passed_over for source in sources if source.passed_over},
        "left_out_by_limit": left_out,
        "undecodable": replaced,
        "repeated_ids": len(rows),
        "fields_without_text": fields,
        "digest": digest.hexdigest(),
        "groups": groups,
    }


def digest_of(sources: Sequence[SourceFiles]) -> str:
    """The digest that `read_sources` would find, without writing anything."""
    digest = Digest()
    for source in sources:
        reading = Reading(config=source.config, tally=Tally([source.config.name]))
        for identifier, _, raw in documents(source, reading):
            digest.add(source.config.name, identifier, raw)
    return digest.hexdigest()


def documents(source: SourceFiles, reading: Reading) -> Iterator[tuple[str, str, bytes]]:
    """Id, text and its UTF-8 of a source's documents, up to its limit; empty ones are dropped."""
    limit = source.config.limit_bytes
    left = sys.maxsize if limit is None else limit
    is_dataset = source.config.format is SourceFormat.datasets
    files = source.files[:1] if is_dataset else source.files  # a dataset is read in one piece
    for number, file in enumerate(files):
        # A tree's file is one document: if it does not fit, another may. Near the limit only the smallest would.
        if source.is_tree and file.bytes > left:
            reading.left_out_files += 1
            if limit is not None and left < limit * _FULL:
                reading.left_out_files += len(files) - number - 1
                return
            continue
        for identifier, text in read_dataset(source, reading) if is_dataset else read_file(file, reading):
            raw = text.encode()
            if not text or text.isspace():
                reading.drop(EMPTY, identifier)
                continue
            if len(raw) > left:
                reading.left_out_files += len(files) - number - 1
                return
            left -= len(raw)
            reading.tally.keep(source.config.name, 1, len(raw))
            yield identifier, text, raw


def _repeated(hashes: array) -> NDArray[np.int64]:
    """Places whose hash stood before them."""
    values = np.frombuffer(hashes, dtype=np.uint64)
    first = np.zeros(len(values), dtype=bool)
    first[np.unique(values, return_index=True)[1]] = True
    return np.flatnonzero(~first)
