"""What a growing store has seen: ids, texts and MinHash bands of every kept document, on disk.

    GROWTH/index/    LMDB: ids      hash of source and id                  -> row
                           digests  xxh3-128 of the text                   -> row
                           bands    number and hash of a band              -> rows (at most 128, like a bucket)
                           portions "added"                                -> how many portions are in it
    GROWTH/bloom.bin Bloom filters, one a band, in place of `bands`

Contract: the index follows from the portions that were committed and can be made anew from them. A portion is added in
one transaction together with the count, so a kill leaves it whole or absent; adding one again changes nothing, which
is why the Bloom filters, that know no transaction, need none.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numba
import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import GrowConfig, IndexKind
from parallel.common.errors import UserError
from parallel.common.files import write_json

_MAP_BYTES = 1 << 40
"""Address space, not disk."""
_BUCKET = 128
_ROW = struct.Struct("<q")
_ADDED = b"added"


class Index:
    """The index of one store."""

    def __init__(self, directory: Path, settings: GrowConfig, bands: int) -> None:
        """Opens it, or makes an empty one.

        Raises:
            UserError: it is damaged, or of another layout than the settings ask for.
        """
        self._directory = directory
        self._kind = settings.index
        directory.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._environment: Any = lmdb.open(str(directory), map_size=_MAP_BYTES, max_dbs=4, sync=True, metasync=True)
            self._ids = self._environment.open_db(b"ids")
            self._digests = self._environment.open_db(b"digests")
            self._portions = self._environment.open_db(b"portions")
            self._bands = self._environment.open_db(b"bands", dupsort=True, dupfixed=True)
        self._bloom = _Bloom(directory / "bloom", settings, bands) if self._kind is IndexKind.bloom else None

    def close(self) -> None:
        """Lets go of the files."""
        self._environment.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise UserError(
                f"the index of the growing store, {self._directory}, cannot be used ({error}): make room on the disk, "
                f"or remove that directory, it is made anew"
            ) from error

    @property
    def added(self) -> int:
        """Portions that are in it."""
        with self._told(), self._environment.begin(db=self._portions) as transaction:
            found = transaction.get(_ADDED)
            return 0 if found is None else _ROW.unpack(found)[0]

    def known_ids(self, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which ids a kept document has; [ids]."""
        with self._told(), self._environment.begin(db=self._ids) as transaction:
            return np.array([transaction.get(key) is not None for key in _keys(hashes)], dtype=bool)

    def rows_of_texts(self, digests: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Row of the kept document with the same text, -1 where there is none; [texts, 2] -> [texts]."""
        with self._told(), self._environment.begin(db=self._digests) as transaction:
            found = (transaction.get(digest.tobytes()) for digest in digests)
            return np.array([-1 if row is None else _ROW.unpack(row)[0] for row in found], dtype=np.int64)

    def candidates(self, bands: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Kept documents that share a band with some new ones: (number of the new one, row), each pair once.

        Args:
            bands: [bands, documents].
        """
        pairs: list[NDArray[np.int64]] = []
        with self._told(), self._environment.begin(db=self._bands) as transaction, transaction.cursor() as cursor:
            for number, band in enumerate(bands):
                keys = _band_keys(number, band)
                order = sorted(range(len(keys)), key=keys.__getitem__)
                for place in order:
                    if cursor.set_key(keys[place]):
                        rows = np.frombuffer(b"".join(cursor.iternext_dup()), dtype="<i8")
                        pairs.append(np.stack([np.full(len(rows), place), rows]))
        if not pairs:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        unique = np.unique(np.concatenate(pairs, axis=1), axis=1)
        return unique[0], unique[1]

    def seen(self, bands: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which new documents share a band with one that the Bloom filters hold; [bands, documents] -> [documents]."""
        assert self._bloom is not None
        return self._bloom.seen(bands)

    @property
    def filled(self) -> float:
        """Share of new documents that the Bloom filters drop by chance as they are now."""
        assert self._bloom is not None
        return self._bloom.false_share()

    def add(
        self,
        portion: int,
        ids: NDArray[np.uint64],
        digests: NDArray[np.uint64],
        bands: NDArray[np.uint64],
        rows: Sequence[int],
    ) -> None:
        """Takes in the kept documents of a portion (0, 1, ...), and notes that it is in."""
        values = [_ROW.pack(row) for row in rows]
        if self._bloom is not None:
            self._bloom.add(bands)
        with self._told(), self._environment.begin(write=True) as transaction:
            with transaction.cursor(db=self._ids) as cursor:
                cursor.putmulti(sorted(zip(_keys(ids), values, strict=True)), overwrite=False)
            with transaction.cursor(db=self._digests) as cursor:
                keys = (digest.tobytes() for digest in digests)
                cursor.putmulti(sorted(zip(keys, values, strict=True)), overwrite=False)
            if self._bloom is None:
                self._add_bands(transaction, bands, values)
            transaction.put(_ADDED, _ROW.pack(portion + 1), db=self._portions)

    def _add_bands(self, transaction: Any, bands: NDArray[np.uint64], values: list[bytes]) -> None:
        with transaction.cursor(db=self._bands) as cursor:
            for number, band in enumerate(bands):
                for key, value in sorted(zip(_band_keys(number, band), values, strict=True)):
                    if not cursor.set_key(key) or cursor.count() < _BUCKET:
                        cursor.put(key, value, dupdata=False)


def _keys(hashes: NDArray[np.uint64]) -> list[bytes]:
    raw = hashes.astype(">u8").tobytes()
    return [raw[start : start + 8] for start in range(0, len(raw), 8)]


def _band_keys(number: int, band: NDArray[np.uint64]) -> list[bytes]:
    prefix = number.to_bytes(2, "big")
    return [prefix + key for key in _keys(np.asarray(band))]


class _Bloom:
    """One Bloom filter for each band, in a mapped file (Bloom 1970; LSHBloom: Khan et al. 2024)."""

    def __init__(self, directory: Path, settings: GrowConfig, bands: int) -> None:
        directory.mkdir(exist_ok=True)
        share = settings.bloom_false_share / bands
        bits = math.ceil(-settings.bloom_documents * math.log(share) / math.log(2) ** 2 / 64) * 64
        layout = {"bits": bits, "hashes": max(1, round(-math.log2(share))), "bands": bands}
        described, file = directory / "layout.json", directory / "bits.bin"
        if not described.is_file():
            with file.open("wb") as opened:
                # Taken now: on a full disk, writing to a mapped hole would end the process without a word.
                os.posix_fallocate(opened.fileno(), 0, bands * bits // 8)
            write_json(described, layout)
        if json.loads(described.read_text()) != layout:
            raise UserError(f"{file} was laid out for another data.grow.bloom_* or number of bands: it cannot change")
        self._hashes = layout["hashes"]
        self._words = np.memmap(file, dtype=np.uint64, mode="r+", shape=(bands, bits // 64))

    def add(self, bands: NDArray[np.uint64]) -> None:
        for words, hashes in zip(self._words, bands, strict=True):
            _set_bits(words, np.ascontiguousarray(hashes), self._hashes)
        self._words.flush()

    def seen(self, bands: NDArray[np.uint64]) -> NDArray[np.bool_]:
        found = np.zeros(bands.shape[1], dtype=bool)
        for words, hashes in zip(self._words, bands, strict=True):
            _test_bits(words, np.ascontiguousarray(hashes), self._hashes, found)
        return found

    def false_share(self) -> float:
        shares = [float(np.bitwise_count(words).mean()) / 64 for words in self._words]
        return 1 - math.prod(1 - share**self._hashes for share in shares)


@numba.njit(nogil=True, cache=True)
def _set_bits(words, hashes, count):
    bits = np.uint64(len(words) * 64)
    for document in range(len(hashes)):
        step = (hashes[document] >> np.uint64(32)) | np.uint64(1)
        place = hashes[document]
        for _ in range(count):
            bit = place % bits
            words[bit >> np.uint64(6)] |= np.uint64(1) << (bit & np.uint64(63))
            place = (place + step) * np.uint64(0x9E3779B97F4A7C15)


@numba.njit(nogil=True, cache=True)
def _test_bits(words, hashes, count, found):
    bits = np.uint64(len(words) * 64)
    for document in range(len(hashes)):
        step = (hashes[document] >> np.uint64(32)) | np.uint64(1)
        place = hashes[document]
        held = True
        for _ in range(count):
            bit = place % bits
            if not (words[bit >> np.uint64(6)] >> (bit & np.uint64(63))) & np.uint64(1):
                held = False
                break
            place = (place + step) * np.uint64(0x9E3779B97F4A7C15)
        found[document] |= held
