"""Shingles and MinHash signatures of texts, compiled.

A token is one CJK, kana or hangul character, else a run of other word characters (`\\w`), of the lower-cased text; a
shingle is `ngram` tokens in a row; a text with fewer tokens is one shingle as a whole. Shingles are 64-bit hashes: two
different ones of a document of a million collide with probability 3e-8, so a Jaccard similarity of them is exact for
all practical purposes. A signature holds `bands x rows` minima of the shingles under random linear functions modulo
2^32 (Broder, 1997), hashed band by band.

Contract: results are pure functions of the text and the constants below, on any machine. The functions work on UTF-8
bytes, release the interpreter's lock and allocate a few bytes for each byte of the longest text. ASCII is lower-cased
here; a text with other characters must come lower-cased (`lower_cased`).
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache

import numba
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_pipeline.document import text_buffer

_NOT_WORD, _WORD, _ALONE = 0, 1, 2
_UNSPACED = (
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7AF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
"""Kana, CJK ideographs and hangul syllables: first and last character of each block."""

# Fixed for all time: a change of any makes other signatures, and so another set of found near-duplicates.
_MINHASH_SEED = 0x5EED_B100_3E47_0001
_FNV_OFFSET = np.uint64(0xCBF29CE484222325)
_FNV_PRIME = np.uint64(0x100000001B3)
_ROLL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_30, _27, _31, _32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)


@cache
def character_classes() -> NDArray[np.uint8]:
    """For every code point: no word character, part of a word, or a token by itself."""
    classes = np.full(0x110000, _NOT_WORD, dtype=np.uint8)
    everything = "".join(map(chr, range(0x110000)))
    for run in re.finditer(r"\w+", everything):
        classes[run.start() : run.end()] = _WORD
    for first, last in _UNSPACED:
        classes[first : last + 1] = _ALONE
    return classes


@cache
def _lower_table() -> NDArray[np.uint8]:
    table = np.arange(256, dtype=np.uint8)
    table[ord("A") : ord("Z") + 1] += 32
    return table


@cache
def linear_functions(count: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Multipliers (odd) and addends of `count` random functions, from the seed by splitmix64."""
    state, values = _MINHASH_SEED, []
    for _ in range(2 * count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        value = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        values.append((value ^ (value >> 31)) >> 32)
    return np.array(values[:count], np.uint32) | np.uint32(1), np.array(values[count:], np.uint32)


def lower_cased(text: str) -> bytes:
    """The form of a text that is cut into tokens: NFC, lower case, UTF-8."""
    return unicodedata.normalize("NFC", text).lower().encode()


@numba.njit(nogil=True, cache=True)
def _count_characters(data, starts, stops, characters):
    for document in range(len(starts)):
        continuing = 0
        for at in range(starts[document], stops[document]):
            continuing += (data[at] & 0xC0) == 0x80
        characters[document] = stops[document] - starts[document] - continuing


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """Texts as the kernels want them: [texts] each but for the bytes."""

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    characters: NDArray[np.int64]


def _prepare(texts: pa.Array, rows: NDArray[np.int64]) -> _Prepared:
    """Some rows of a large_string array: ASCII texts stay where they are, the others are lower-cased and put behind."""
    data, borders = text_buffer(texts)
    starts, stops = borders[rows], borders[rows + 1]
    characters = np.empty(len(starts), dtype=np.int64)
    _count_characters(data, starts, stops, characters)
    foreign = np.flatnonzero(characters != stops - starts)
    if len(foreign):
        pieces = [lower_cased(data[starts[index] : stops[index]].tobytes().decode()) for index in foreign]
        lengths = np.array([len(piece) for piece in pieces])
        stops[foreign] = len(data) + np.cumsum(lengths)
        starts[foreign] = stops[foreign] - lengths
        data = np.frombuffer(b"".join([data, *pieces]), dtype=np.uint8)
    return _Prepared(data=data, starts=starts, stops=stops, characters=characters)


@numba.njit(nogil=True, cache=True, inline="always")
def _mix(value: np.uint64) -> np.uint64:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    value = (value ^ (value >> _30)) * _MIX_1
    value = (value ^ (value >> _27)) * _MIX_2
    return value ^ (value >> _31)


@numba.njit(nogil=True, cache=True)
def _hash_tokens(data, start, stop, classes, lower, tokens):
    """Writes the hash of each token to `tokens`; returns how many there are."""
    count = 0
    state = _FNV_OFFSET
    inside = False
    at = start
    while at < stop:
        first = data[at]
        if first < 0x80:
            width, kind = 1, classes[first]
        elif first < 0xE0:
            width = 2
            kind = classes[(np.int64(first & 0x1F) << 6) | np.int64(data[at + 1] & 0x3F)]
        elif first < 0xF0:
            width = 3
            code = (np.int64(first & 0x0F) << 12) | (np.int64(data[at + 1] & 0x3F) << 6)
            kind = classes[code | np.int64(data[at + 2] & 0x3F)]
        else:
            width = 4
            code = (np.int64(first & 0x07) << 18) | (np.int64(data[at + 1] & 0x3F) << 12)
            kind = classes[code | (np.int64(data[at + 2] & 0x3F) << 6) | np.int64(data[at + 3] & 0x3F)]
        if kind != _WORD and inside:
            tokens[count] = _mix(state)
            count += 1
            state = _FNV_OFFSET
            inside = False
        if kind != _NOT_WORD:
            for place in range(at, at + width):
                state = (state ^ np.uint64(lower[data[place]])) * _FNV_PRIME
            if kind == _ALONE:
                tokens[count] = _mix(state)
                count += 1
                state = _FNV_OFFSET
            else:
                inside = True
        at += width
    if inside:
        tokens[count] = _mix(state)
        count += 1
    return count


@numba.njit(nogil=True, cache=True)
def _hash_shingles(data, start, stop, classes, lower, ngram, tokens, shingles):
    """Writes the hash of each shingle, repeated ones too; returns how many there are, at least one."""
    count = _hash_tokens(data, start, stop, classes, lower, tokens)
    if count < ngram:
        state = _FNV_OFFSET
        for at in range(start, stop):
            state = (state ^ np.uint64(lower[data[at]])) * _FNV_PRIME
        shingles[0] = _mix(state)
        return 1
    oldest = np.uint64(1)
    for _ in range(ngram - 1):
        oldest = oldest * _ROLL
    state = np.uint64(0)
    for at in range(count):
        if at >= ngram:
            state = state - tokens[at - ngram] * oldest
        state = state * _ROLL + tokens[at]
        if at >= ngram - 1:
            shingles[at - ngram + 1] = _mix(state)
    return count - ngram + 1


@numba.njit(nogil=True, cache=True)
def _longest(starts, stops):
    longest = 0
    for index in range(len(starts)):
        longest = max(longest, stops[index] - starts[index])
    return longest


@numba.njit(nogil=True, cache=True)
def _sketch(data, starts, stops, classes, lower, ngram, multipliers, addends, rows, bands):
    """Fills bands, [documents, bands]."""
    room = _longest(starts, stops) + 1
    tokens = np.empty(room, np.uint64)
    shingles = np.empty(room, np.uint64)
    size = len(multipliers)
    minima = np.empty(size, np.uint32)
    for document in range(len(starts)):
        count = _hash_shingles(data, starts[document], stops[document], classes, lower, ngram, tokens, shingles)
        minima[:] = np.uint32(0xFFFFFFFF)
        for index in range(count):
            value = np.uint32(shingles[index] >> _32)
            for lane in range(size):
                permuted = np.uint32(multipliers[lane] * value + addends[lane])
                minima[lane] = min(minima[lane], permuted)
        for band in range(bands.shape[1]):
            state = np.uint64(band)
            for lane in range(band * rows, (band + 1) * rows):
                state = _mix((state * _ROLL) ^ np.uint64(minima[lane]))
            bands[document, band] = state


@numba.njit(nogil=True, cache=True)
def _collect(data, starts, stops, classes, lower, ngram, out, counts):
    """Puts the shingles of all documents one behind the other into `out`."""
    tokens = np.empty(_longest(starts, stops) + 1, np.uint64)
    filled = 0
    for document in range(len(starts)):
        count = _hash_shingles(data, starts[document], stops[document], classes, lower, ngram, tokens, out[filled:])
        counts[document] = count
        filled += count
    return filled


@numba.njit(nogil=True, cache=True)
def _count_tokens(data, starts, stops, classes, lower, tokens_in):
    room = np.empty(_longest(starts, stops) + 1, np.uint64)
    for document in range(len(starts)):
        tokens_in[document] = _hash_tokens(data, starts[document], stops[document], classes, lower, room)


def sketch(
    texts: pa.Array, rows: NDArray[np.int64], *, ngram: int, bands: int, rows_per_band: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Band hashes [rows, bands] and lengths in characters [rows] of some rows of a large_string array."""
    given = _prepare(texts, rows)
    hashes = np.empty((len(rows), bands), dtype=np.uint64)
    functions = linear_functions(bands * rows_per_band)
    tables = character_classes(), _lower_table()
    _sketch(given.data, given.starts, given.stops, *tables, ngram, *functions, rows_per_band, hashes)
    return hashes, given.characters


@dataclass(frozen=True, kw_only=True, slots=True)
class ShingleLists:
    """Shingles of some texts, one list each."""

    lists: list[NDArray[np.uint64]]
    """In the order of the text, repeated ones too."""
    tokens: NDArray[np.int64]
    """Tokens of each text, [texts]; a text with fewer than `ngram` has one shingle, the whole of it."""


def shingle_lists(texts: pa.Array, rows: NDArray[np.int64], *, ngram: int) -> ShingleLists:
    """The shingles of each of some rows of a large_string array."""
    given = _prepare(texts, rows)
    out, counts = _collected(given, ngram)
    tokens = counts + ngram - 1
    one = np.flatnonzero(counts == 1)
    found = np.empty(len(one), dtype=np.int64)
    _count_tokens(given.data, given.starts[one], given.stops[one], character_classes(), _lower_table(), found)
    tokens[one] = found
    return ShingleLists(lists=np.split(out, np.cumsum(counts)[:-1]), tokens=tokens)


def shingle_sets(texts: pa.Array, rows: NDArray[np.int64], *, ngram: int) -> list[NDArray[np.uint64]]:
    """The set of shingles of each of some rows, as sorted arrays without repetition."""
    out, counts = _collected(_prepare(texts, rows), ngram)
    return [np.unique(part) for part in np.split(out, np.cumsum(counts)[:-1])]


def _collected(given: _Prepared, ngram: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """All shingles, text after text, and how many each has."""
    out = np.empty(int((given.stops - given.starts).sum()) + len(given.starts), dtype=np.uint64)
    counts = np.empty(len(given.starts), dtype=np.int64)
    tables = character_classes(), _lower_table()
    filled = _collect(given.data, given.starts, given.stops, *tables, ngram, out, counts)
    return out[:filled], counts
