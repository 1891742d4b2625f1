"""Megatron's MMIDIDX format: token sequences as one `.bin` of ids and one `.idx` that says where each one lies.

    .idx:  "MMIDIDX\\0\\0"  version 1 (u64)  dtype code (u8)  sequences (u64)  document borders (u64)
           lengths int32 [sequences]   byte offsets int64 [sequences]   borders int64 [documents + 1]

All little-endian. The format knows no unsigned 32-bit ids: vocabularies above 65,536 are written with the code of
int32, whose bytes are the same for every id below 2^31.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from parallel.common.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODE_OF_STORED = {np.dtype("<u2"): 8, np.dtype("<u4"): 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Index:
    """What an `.idx` file says."""

    dtype: np.dtype
    """Of the ids in the `.bin`."""
    lengths: NDArray[np.int32]
    """Tokens in each sequence, [sequences]."""
    byte_offsets: NDArray[np.int64]
    """Where each sequence begins in the `.bin`, [sequences]."""
    document_borders: NDArray[np.int64]
    """First sequence of each document, and the number of sequences, [documents + 1]."""


def dtype_for(vocabulary_size: int) -> np.dtype:
    """The narrowest type that holds every id: uint16, else uint32."""
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


def index_parts(lengths: NDArray[np.int32], dtype: np.dtype) -> Iterable[bytes]:
    """The bytes of an `.idx` in which every sequence is a document and the `.bin` has no gaps."""
    count = len(lengths)
    byte_offsets = np.zeros(count, dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=byte_offsets[1:])
    byte_offsets *= dtype.itemsize
    yield _HEADER.pack(_MAGIC, _VERSION, _CODE_OF_STORED[dtype], count, count + 1)
    yield lengths.astype("<i4").tobytes()
    yield byte_offsets.tobytes()
    yield np.arange(count + 1, dtype="<i8").tobytes()


def read_ids(path: Path, dtype: np.dtype) -> np.memmap:
    """The ids of a whole `.bin`, mapped and not read; [tokens]."""
    return np.memmap(path, dtype=dtype, mode="r")


def read_index(path: Path) -> Index:
    """Reads an `.idx`, ours or one that megatron-core wrote.

    Raises:
        UserError: the file is missing, or is not an index of version 1.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    content = path.read_bytes()
    if len(content) < _HEADER.size:
        raise UserError(f"{path} is not a Megatron index: it is cut off after {len(content)} bytes")
    magic, version, code, sequences, borders = _HEADER.unpack_from(content)
    if magic != _MAGIC or version != _VERSION or code not in _CODES:
        raise UserError(f"{path} is not a Megatron index of version {_VERSION} with integer ids")
    if len(content) < _HEADER.size + 12 * sequences + 8 * borders:
        raise UserError(f"{path} is damaged: it promises {sequences} sequences, more than it holds")
    at = _HEADER.size
    lengths = np.frombuffer(content, dtype="<i4", count=sequences, offset=at)
    byte_offsets = np.frombuffer(content, dtype="<i8", count=sequences, offset=at + 4 * sequences)
    document_borders = np.frombuffer(content, dtype="<i8", count=borders, offset=at + 12 * sequences)
    return Index(dtype=_CODES[code], lengths=lengths, byte_offsets=byte_offsets, document_borders=document_borders)
