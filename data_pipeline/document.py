"""Documents on disk between two stages: Parquet parts of record batches, read and written a batch at a time.

A document is an id, a text and a source; a batch is about 8 MiB of text of one source, one row group, the unit of
every stage's work. Parts stand in the order of the sources in the configuration, so a document is known to all stages
by its row, its position in the concatenation of all parts, and the first of two rows is never of the later source.

Stage functions take a record batch and return one, know nothing of files, and may run in any order on any number of
threads; a `Mapper` puts their results back in order, so that output never depends on how many there are.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.format import header_data_from_array_1_0, write_array_header_1_0
from numpy.typing import NDArray

BATCH_BYTES = 8 << 20
"""Text in a batch; one document more may be in it."""
_PART_BYTES = 256 << 20
SCHEMA = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One batch of a stage's output: a row group of a part."""

    file: str
    row_group: int
    source: str
    first_row: int
    rows: int
    text_bytes: int


def batch_of(ids: Sequence[str], texts: Sequence[str]) -> pa.RecordBatch:
    """A batch from Python strings."""
    return pa.record_batch([pa.array(ids, pa.large_string()), pa.array(texts, pa.large_string())], schema=SCHEMA)


def text_buffer(texts: pa.Array) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The UTF-8 of a large_string array without copying: bytes, and where each text begins and the last ends."""
    _, offsets, data = texts.buffers()
    borders = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    content = np.frombuffer(data if data is not None else b"", dtype=np.uint8)
    content.flags.writeable = False
    return content, borders


def save_array(path: Path, array: NDArray[Any]) -> None:
    """The bytes of `np.save`, which does not say what stopped it: a full disk is told from other errors by its number.

    Raises:
        OSError: it could not be written.
    """
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        write_array_header_1_0(file, header_data_from_array_1_0(array))
        file.write(array.data)


class PartWriter:
    """Writes batches, source by source, as `NNNNN.parquet` in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: pq.ParquetWriter | None = None
        self._file = ""
        self._files = 0
        self._file_bytes = 0
        self._row_group = 0
        self._row = 0
        self.groups: list[Group] = []

    def write(self, source: str, batch: pa.RecordBatch) -> None:
        """Adds one row group; the sources come one after the other."""
        if batch.num_rows == 0:
            return
        borders = text_buffer(batch.column("text"))[1]
        text_bytes = int(borders[-1] - borders[0])
        new_source = bool(self.groups) and self.groups[-1].source != source
        if self._writer is None or new_source or self._file_bytes + text_bytes > _PART_BYTES:
            self._open()
        assert self._writer is not None
        self._writer.write_batch(batch, row_group_size=batch.num_rows)
        self.groups.append(
            Group(
                file=self._file,
                row_group=self._row_group,
                source=source,
                first_row=self._row,
                rows=batch.num_rows,
                text_bytes=text_bytes,
            )
        )
        self._row += batch.num_rows
        self._row_group += 1
        self._file_bytes += text_bytes

    def close(self) -> list[dict[str, Any]]:
        """Ends the last part; the groups, for the stage's manifest."""
        if self._writer is not None:
            self._writer.close()
        return [asdict(group) for group in self.groups]

    def _open(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._file = f"{self._files:05d}.parquet"
        self._writer = pq.ParquetWriter(
            self._directory / self._file,
            SCHEMA,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._files, self._file_bytes, self._row_group = self._files + 1, 0, 0


class Parts:
    """The documents that a finished stage wrote."""

    def __init__(self, directory: Path, groups: Iterable[dict[str, Any]]) -> None:
        self.directory = directory
        self.groups = tuple(Group(**group) for group in groups)
        self.rows = sum(group.rows for group in self.groups)
        self.text_bytes = sum(group.text_bytes for group in self.groups)
        self.sources = tuple(dict.fromkeys(group.source for group in self.groups))

    def read(self, group: Group, columns: Sequence[str] = ("id", "text")) -> pa.RecordBatch:
        """One batch, or some columns of it."""
        with pq.ParquetFile(self.directory / group.file, page_checksum_verification=True) as file:
            table = file.read_row_group(group.row_group, columns=list(columns), use_threads=False)
        return table.combine_chunks().to_batches()[0]

    def source_of_row(self) -> NDArray[np.int16]:
        """Number of each row's source in `sources`; [rows]."""
        number = {source: index for index, source in enumerate(self.sources)}
        numbers = np.array([number[group.source] for group in self.groups], dtype=np.int16)
        return np.repeat(numbers, [group.rows for group in self.groups])

    def document(self, row: int) -> tuple[str, str]:
        """Id and text of one row."""
        group = next(group for group in self.groups if row < group.first_row + group.rows)
        batch = self.read(group)
        return batch.column("id")[row - group.first_row].as_py(), batch.column("text")[row - group.first_row].as_py()

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """Ids of some rows, in the order in which they are given; reads only the batches that hold one."""
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        found = [""] * len(rows)
        for group in self.groups:
            low, high = np.searchsorted(sorted_rows, (group.first_row, group.first_row + group.rows))
            if low < high:
                wanted = pa.array(sorted_rows[low:high] - group.first_row)
                ids = self.read(group, ("id",)).column("id").take(wanted).to_pylist()
                for place, identifier in zip(order[low:high].tolist(), ids, strict=True):
                    found[place] = identifier
        return found


class Mapper(Protocol):
    """Does a stage's work on every batch: `map` whose results come in order, wherever each is computed."""

    def __call__[Item, Result](self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]: ...


def workers() -> int:
    """Threads that a stage uses: the cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def map_in_order[Item, Result](function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map` on all cores, results in order; only a few batches are in memory at once."""
    count = workers()
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
