"""Decontamination: a document that holds a stretch of an evaluation file does not go into training.

A stretch is `ngram` tokens in a row, tokens and hashes as in near-deduplication (lower-cased, punctuation does not
count, one CJK character a token; Brown et al. 2020 took 13). Any one in common drops the document. Which item of which
file was met by how many stretches stands in the stage's table and, as hits per file, in the report. Items with fewer
tokens than a stretch cannot be looked for without dropping everything: they are counted, so that nobody believes them
covered.

Memory: 12 bytes for each token of the evaluation files.
"""

import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.config import DecontaminateConfig
from data_pipeline.dedup.shingles import shingle_lists
from data_pipeline.document import Group, Mapper, Parts, map_in_order, text_buffer
from data_pipeline.progress import Meter
from data_pipeline.report import Tally
from parallel.common.errors import UserError
from parallel.common.files import hash_file

_FILE = "hits.parquet"
REASON = "with a stretch of an evaluation file"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The stretches of all evaluation files."""

    hashes: NDArray[np.uint64]
    """Sorted, each once; [stretches]."""
    item: NDArray[np.int32]
    """The first item that has it; [stretches]."""
    file_of_item: NDArray[np.int32]
    number_in_file: NDArray[np.int32]
    files: tuple[str, ...]
    too_short: tuple[int, ...]
    """Items of each file that have fewer tokens than a stretch."""


def evaluation_fingerprints(settings: DecontaminateConfig) -> list[str]:
    """Hash of each evaluation file.

    Raises:
        UserError: one does not exist.
    """
    for file in settings.files:
        if not Path(file).expanduser().is_file():
            raise UserError(f"data.stages.decontaminate.files: there is no file {file} (from {Path.cwd()})")
    return [hash_file(Path(file).expanduser()) for file in settings.files]


def read_evaluation(settings: DecontaminateConfig) -> Evaluation:
    """Reads the evaluation files.

    Raises:
        UserError: one is damaged, holds no text, or is neither jsonl nor txt.
    """
    hashes: list[NDArray[np.uint64]] = []
    items: list[NDArray[np.int32]] = []
    files: list[int] = []
    numbers: list[int] = []
    too_short: list[int] = []
    for file_number, file in enumerate(settings.files):
        texts = list(_items(Path(file).expanduser()))
        if not texts:
            raise UserError(f"data.stages.decontaminate.files: {file} holds no text")
        array = pa.array([text for _, text in texts], pa.large_string())
        found = shingle_lists(array, np.arange(len(texts)), ngram=settings.ngram)
        short = 0
        for (number, _), stretches, tokens in zip(texts, found.lists, found.tokens, strict=True):
            if tokens < settings.ngram:
                short += 1
                continue
            hashes.append(stretches)
            items.append(np.full(len(stretches), len(files), dtype=np.int32))
            files.append(file_number)
            numbers.append(number)
        too_short.append(short)
    joined = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    owner = np.concatenate(items) if items else np.zeros(0, np.int32)
    unique, first = np.unique(joined, return_index=True)
    return Evaluation(
        hashes=unique,
        item=owner[first],
        file_of_item=np.array(files, dtype=np.int32),
        number_in_file=np.array(numbers, dtype=np.int32),
        files=tuple(Path(file).name for file in settings.files),
        too_short=tuple(too_short),
    )


def _items(file: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of each item: of a record all its texts, one behind the other."""
    stem = file.name.removesuffix(".gz").removesuffix(".zst")
    is_json = stem.endswith((".jsonl", ".ndjson"))
    if not is_json and not stem.endswith(".txt"):
        raise UserError(f"data.stages.decontaminate.files: {file} is neither jsonl nor txt (nor .gz or .zst of them)")
    try:
        with _opened(file) as lines:
            for number, line in enumerate(lines, start=1):
                text = (
                    " ".join(_texts(orjson.loads(line))) if is_json and line.strip() else line.decode(errors="replace")
                )
                if text.strip():
                    yield number, text
    except (OSError, EOFError, ValueError) as error:
        said = str(error).strip().rstrip(".")
        raise UserError(f"data.stages.decontaminate.files: {file} cannot be read: {said}") from error


def _opened(file: Path) -> io.BufferedIOBase:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.name.endswith(".zst"):
        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))  # type: ignore[arg-type]
    return file.open("rb")


def _texts(value: Any) -> Iterator[str]:
    """Every string in a record."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for element in value.values():
            yield from _texts(element)
    elif isinstance(value, list):
        for element in value:
            yield from _texts(element)


def decontaminate_documents(
    parts: Parts,
    came_in: NDArray[np.bool_],
    settings: DecontaminateConfig,
    directory: Path,
    meter: Meter,
    mapper: Mapper = map_in_order,
) -> dict[str, Any]:
    """Writes which of the rows that `came_in` hold a stretch; returns the counts."""
    evaluation = read_evaluation(settings)
    tally = Tally(parts.sources)
    columns: dict[str, list[Any]] = {"row": [], "id": [], "source": [], "file": [], "item": [], "stretches": []}
    met: set[int] = set()
    work = partial(_look, parts, came_in, settings.ngram, evaluation)
    for group, (kept, kept_bytes, found) in zip(parts.groups, mapper(work, parts.groups), strict=True):
        tally.keep(group.source, kept, kept_bytes)
        for row, identifier, text, items, stretches in found:
            item = items[0]
            file, number = evaluation.files[evaluation.file_of_item[item]], int(evaluation.number_in_file[item])
            tally.drop(group.source, REASON, identifier, len(text.encode()), text, file=file, item=number)
            values = (row, identifier, group.source, file, number, stretches)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
            met.update(items)
        meter.advance(group.text_bytes)
    table = pa.table(
        {
            name: pa.array(values, pa.int64() if name in ("row", "item", "stretches") else pa.string())
            for name, values in columns.items()
        }
    )
    pq.write_table(table, directory / _FILE, compression="zstd", write_page_checksum=True)
    files = {
        f"{number}: {name}" if evaluation.files.count(name) > 1 else name: {
            "items": int((evaluation.file_of_item == number).sum()) + evaluation.too_short[number],
            "too_short": evaluation.too_short[number],
            "met": sum(int(evaluation.file_of_item[item]) == number for item in met),
            "documents": columns["file"].count(name),
        }
        for number, name in enumerate(evaluation.files)
    }
    return {"counts": tally.to_json(), "evaluation": files, "ngram": settings.ngram}


def removed_rows(directory: Path) -> NDArray[np.int64]:
    """Rows that a finished stage took out, ascending."""
    return read_hits(directory).column("row").to_numpy()


def read_hits(directory: Path) -> pa.Table:
    """row, id, source, file, item and number of stretches of each document that was dropped."""
    return pq.read_table(directory / _FILE, page_checksum_verification=True)


type Hit = tuple[int, str, str, list[int], int]
"""Row, id, text, items, stretches."""


def _look(
    parts: Parts, came_in: NDArray[np.bool_], ngram: int, evaluation: Evaluation, group: Group
) -> tuple[int, int, Sequence[Hit]]:
    """How many documents of a batch stay, their bytes, and the others."""
    batch = parts.read(group)
    places = np.flatnonzero(came_in[group.first_row : group.first_row + group.rows])
    sizes = np.diff(text_buffer(batch.column("text"))[1])[places]
    found = shingle_lists(batch.column("text"), places, ngram=ngram)
    hits: list[Hit] = []
    clean = np.ones(len(places), dtype=bool)
    for index, (stretches, tokens) in enumerate(zip(found.lists, found.tokens, strict=True)):
        if tokens < ngram or not len(evaluation.hashes):
            continue
        at = np.searchsorted(evaluation.hashes, stretches)
        at[at == len(evaluation.hashes)] = 0
        met = at[evaluation.hashes[at] == stretches]
        if len(met):
            clean[index] = False
            items = list(dict.fromkeys(evaluation.item[met].tolist()))
            row = int(places[index])
            text = batch.column("text")[row].as_py()
            hits.append((group.first_row + row, batch.column("id")[row].as_py(), text, items, len(met)))
    return int(clean.sum()), int(sizes[clean].sum()), hits
