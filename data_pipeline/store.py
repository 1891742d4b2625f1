"""The token store: shards of token ids, sealed one by one in a manifest.

    STORE/manifest.jsonl   header, one line a sealed shard, end; each line carries a checksum of itself
          tokenizer.json   what the ids mean
          shard-00000.bin/.idx          ids in Megatron's format, one sequence a document, each ending with its EOD
          shard-00000.docs.parquet      id, source, offset and length in tokens, text_bytes of each document

Contract: a shard holds documents of one source and one split. Its files are written under temporary names, flushed,
hashed and renamed, and only then does the manifest name them; so what the manifest names is whole, and what it does
not name is rubbish that the next writer removes. A job that was killed goes on after its last sealed shard and ends
with the same bytes as one that was not: there are no times, host names or paths in the store.

`Store.open` looks at checksums of lines and sizes of files, which takes milliseconds; `Store.check` reads everything.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.indexed import dtype_for, index_parts, read_ids, read_index
from data_pipeline.manifest import FILE_NAME, FORMAT, Manifest, Shard, checksum, totals
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import UserError
from parallel.common.files import hash_file, sync_directory
from parallel.common.lines import JsonLines

TRAINING = "training"
VALIDATION = "validation"
_COUNTED_AT_ONCE = 1 << 24
_SUFFIXES = ("bin", "idx", "docs.parquet")
_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedDocument:
    """One document on its way into the store."""

    id: str
    tokens: list[int]
    """Its ids, without the end of document: the writer puts that."""
    text_bytes: int
    """Length of the text in UTF-8, for bits per byte."""


def _header(tokenizer: Tokenizer, configuration: str) -> dict[str, Any]:
    return {
        "kind": "header",
        "format": FORMAT,
        "dtype": dtype_for(tokenizer.vocabulary_size).name,
        "tokenizer": {
            "vocabulary_size": tokenizer.vocabulary_size,
            "end_of_document": tokenizer.end_of_document,
            "padding": tokenizer.padding,
            "fingerprint": tokenizer.fingerprint,
        },
        "configuration": configuration,
    }


class Store:
    """A finished store, read-only."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self._manifest = manifest
        facts = manifest.header["tokenizer"]
        self.dtype = _DTYPES[manifest.header["dtype"]]
        self.vocabulary_size: int = facts["vocabulary_size"]
        self.end_of_document: int = facts["end_of_document"]
        self.padding: int = facts["padding"]
        self.tokenizer_fingerprint: str = facts["fingerprint"]
        self.configuration: str = manifest.header["configuration"]
        """Fingerprint of the configuration that the store was built from."""
        self.ended = manifest.ended
        """Nothing is added any more, unless somebody takes up the store again."""

    @classmethod
    def open(cls, path: Path, *, follow: bool = False) -> "Store":
        """Opens a store that `bloomery data build` finished.

        Args:
            path: Its directory.
            follow: A store that still grows will do: what is sealed so far is there.

        Raises:
            UserError: it is missing, unfinished or damaged.
        """
        manifest = Manifest.read(path)
        if manifest is None:
            raise UserError(f"there is no token store at {path}: make it with `bloomery data build`")
        if not manifest.ended and not follow:
            raise UserError(f"the token store at {path} is not finished: run `bloomery data build` again, it goes on")
        store = cls(path, manifest)
        if not store.tokenizer.is_file() or hash_file(store.tokenizer) != store.tokenizer_fingerprint:
            raise UserError(f"{store.tokenizer} is missing or not the one that the store was made with")
        return store

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer.json."""
        return self.path / "tokenizer.json"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the order in which they first appear."""
        return tuple(dict.fromkeys(shard.source for shard in self._manifest.shards))

    def shards(self, *, split: str | None = None, source: str | None = None) -> tuple[Shard, ...]:
        """The shards of a split and of a source (of all, by default), in the order in which they were sealed."""
        return tuple(
            shard
            for shard in self._manifest.shards
            if (split is None or shard.split == split) and (source is None or shard.source == source)
        )

    def windows(self, *, split: str, source: str) -> list[tuple[Shard, ...]]:
        """The shards of a source and split by window: together what one build made, alone what was sealed growing."""
        shards = self.shards(split=split, source=source)
        together = tuple(shard for shard in shards if not shard.window)
        return [*([together] if together else []), *((shard,) for shard in shards if shard.window)]

    def tokens(self, shard: Shard) -> np.memmap:
        """A shard's ids, mapped; uint16 or uint32 [tokens]."""
        return read_ids(self.path / f"{shard.stem}.bin", self.dtype)

    def document_offsets(self, shard: Shard) -> NDArray[np.int64]:
        """Where each document begins, and where the last ends, in tokens; [documents + 1].

        Raises:
            UserError: the index is damaged.
        """
        file = self.path / f"{shard.stem}.idx"
        index = read_index(file)
        offsets = np.zeros(len(index.lengths) + 1, dtype=np.int64)
        np.cumsum(index.lengths, out=offsets[1:])
        one_document_each = len(index.document_borders) == len(offsets) == shard.documents + 1
        without_gaps = np.array_equal(index.byte_offsets, offsets[:-1] * index.dtype.itemsize)
        whole = offsets[-1] == shard.tokens and index.dtype.itemsize == self.dtype.itemsize
        if not (one_document_each and without_gaps and whole):
            raise UserError(f"{file} is damaged: it does not add up to what the manifest says; build the store again")
        return offsets

    def token_counts(self, *, split: str, source: str | None = None) -> NDArray[np.int64]:
        """How often each id stands in a split, of one source or of all; [vocabulary_size], in bounded memory."""
        counts = np.zeros(self.vocabulary_size, dtype=np.int64)
        for shard in self.shards(split=split, source=source):
            tokens = self.tokens(shard)
            for start in range(0, len(tokens), _COUNTED_AT_ONCE):
                counts += np.bincount(tokens[start : start + _COUNTED_AT_ONCE], minlength=self.vocabulary_size)
        return counts

    def check(self) -> None:
        """Reads every file and compares its hash with the manifest's.

        Raises:
            UserError: names the first file that is damaged.
        """
        for shard in self._manifest.shards:
            for name, facts in shard.files.items():
                if hash_file(self.path / name) != facts["hash"]:
                    raise UserError(f"{self.path / name} is damaged: its content changed since it was written")


@contextmanager
def _room_on_disk(path: Path) -> Iterator[None]:
    """Says plainly that a disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"there is no space left for the token store at {path}: free some and run it again") from error


@contextmanager
def _flushed(path: Path) -> Iterator[IO[bytes]]:
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


class StoreWriter:
    """Writes a store, or goes on with one that was not finished.

    A caller that goes on skips the documents that stand already: `documents_written(source, split)` of each. Which
    documents those are follows from the caller's order, which must be the same in every run.
    """

    def __init__(self, path: Path, *, tokenizer: Tokenizer, configuration: str, grow: bool = False) -> None:
        """Opens the directory for writing; what no sealed shard claims is removed.

        Args:
            path: Directory of the store, made if missing; files of other names in it are left alone.
            tokenizer: Goes into the store as `tokenizer.json`.
            configuration: Fingerprint of everything that the store's content depends on.
            grow: Go on behind the end of a finished store, whatever it was made from.

        Raises:
            UserError: the store there was built from another configuration or tokenizer, or is damaged.
        """
        self.path = path
        self._end_of_document = tokenizer.end_of_document
        self._dtype = dtype_for(tokenizer.vocabulary_size)
        header = _header(tokenizer, configuration)
        path.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(path / FILE_NAME)
        manifest = Manifest.read(path)
        self._shards = list(manifest.shards) if manifest else []
        self.finished: bool = manifest is not None and manifest.ended
        """The store is whole; nothing can be added."""
        if manifest is not None and grow:
            header["configuration"] = manifest.header["configuration"]
        self._grows = grow
        if manifest is not None and manifest.header != header:
            changed = "tokenizer" if manifest.header["tokenizer"] != header["tokenizer"] else "configuration"
            raise UserError(
                f"the token store at {path} was begun with another {changed}: give another data.store, or remove it"
            )
        self._remove_unsealed()
        with _room_on_disk(path):
            tokenizer.save(path / "tokenizer.json")
            if manifest is None:
                self._lines.path.unlink(missing_ok=True)
                self._append(header)
            else:
                self._cut_torn_line()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What is sealed so far."""
        return tuple(self._shards)

    def documents_written(self, source: str, split: str) -> int:
        """Documents of a source and split in sealed shards."""
        return sum(shard.documents for shard in self._shards if (shard.source, shard.split) == (source, split))

    def add_shard(
        self,
        source: str,
        split: str,
        documents: Iterator[TokenizedDocument],
        *,
        max_tokens: int | None = None,
        window: bool = False,
    ) -> Shard | None:
        """Writes and seals one shard from the next documents of an iterator.

        Args:
            source: The source of all of them.
            split: "training" or "validation".
            documents: Taken until it ends or the shard is full; the rest stays in the iterator for the next shard.
            max_tokens: The shard is full with the document that reaches this many tokens; by default never.
            window: The store grows: the shard is a window of its own.

        Returns:
            The sealed shard, or None where no document was left: nothing is written then.

        Raises:
            UserError: the disk is full.
        """
        assert self._grows or not self.finished
        assert split in (TRAINING, VALIDATION)
        stem = f"shard-{len(self._shards):05d}"
        with _room_on_disk(self.path):
            columns = self._write_tokens(self._temporary(f"{stem}.bin"), documents, max_tokens)
            lengths = np.array(columns["length"], dtype=np.int32)
            if not len(lengths):
                self._remove_unsealed()
                return None
            with _flushed(self._temporary(f"{stem}.idx")) as file:
                file.writelines(index_parts(lengths, self._dtype))
            self._write_documents(self._temporary(f"{stem}.docs.parquet"), source, columns)
            files = {}
            for name in (f"{stem}.{suffix}" for suffix in _SUFFIXES):
                temporary = self._temporary(name)
                files[name] = {"bytes": temporary.stat().st_size, "hash": hash_file(temporary)}
            for name in files:
                self._temporary(name).rename(self.path / name)
            sync_directory(self.path)
            shard = Shard(
                index=len(self._shards),
                source=source,
                split=split,
                documents=len(lengths),
                tokens=int(lengths.sum(dtype=np.int64)),
                text_bytes=sum(columns["text_bytes"]),
                files=files,
                window=window,
            )
            self._append(shard.record())
        self.finished = False
        self._shards.append(shard)
        return shard

    def finish(self) -> Store:
        """Ends the manifest, which makes the store readable; does nothing where it has ended already."""
        if not self.finished:
            with _room_on_disk(self.path):
                self._append({"kind": "end", **totals(self._shards)})
            self.finished = True
        return Store.open(self.path)

    def _temporary(self, name: str) -> Path:
        return self.path / f".{name}.tmp"

    def _write_tokens(
        self, path: Path, documents: Iterator[TokenizedDocument], max_tokens: int | None
    ) -> dict[str, list[Any]]:
        """Writes the `.bin`; returns the columns of what was written."""
        columns: dict[str, list[Any]] = {"id": [], "length": [], "text_bytes": []}
        written = 0
        with _flushed(path) as file:
            while max_tokens is None or written < max_tokens:
                document = next(documents, None)
                if document is None:
                    break
                file.write(np.array([*document.tokens, self._end_of_document], dtype=self._dtype).tobytes())
                columns["id"].append(document.id)
                columns["length"].append(len(document.tokens) + 1)
                columns["text_bytes"].append(document.text_bytes)
                written += len(document.tokens) + 1
        return columns

    def _write_documents(self, path: Path, source: str, columns: dict[str, list[Any]]) -> None:
        lengths = np.array(columns["length"], dtype=np.int64)
        table = pa.table(
            {
                "id": pa.array(columns["id"], pa.string()),
                "source": pa.array([source] * len(lengths), pa.string()),
                "offset": pa.array(np.cumsum(lengths) - lengths),
                "length": pa.array(lengths),
                "text_bytes": pa.array(columns["text_bytes"], pa.int64()),
            }
        )
        with _flushed(path) as file:
            pq.write_table(table, file, compression="zstd")

    def _append(self, record: dict[str, Any]) -> None:
        """Adds a line to the manifest; it is on the disk when this returns."""
        self._lines.append({**record, "checksum": checksum(record)})
        descriptor = os.open(self._lines.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(self.path)

    def _cut_torn_line(self) -> None:
        with self._lines.path.open("rb") as file:
            torn = not file.read().endswith(b"\n")
        if torn:
            self._lines.keep(lambda _: True)

    def _remove_unsealed(self) -> None:
        sealed = {name for shard in self._shards for name in shard.files}
        for pattern in ("shard-*.bin", "shard-*.idx", "shard-*.docs.parquet", ".shard-*.tmp"):
            for file in self.path.glob(pattern):
                if file.name not in sealed:
                    file.unlink()
