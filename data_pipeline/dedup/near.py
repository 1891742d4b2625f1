"""Near-duplicate removal: MinHash bands find candidates, exact Jaccard over shingles decides.

Documents are taken in a stated order (source, then longest, then smallest id); each is compared with the documents
kept so far that share a band with it, and is removed if one of them resembles it at the threshold or more. So what is
kept is the maximal independent set that a greedy walk in that order finds: no two kept documents are near-duplicates
(beyond what the bands miss: with 20 bands of 6 rows, 0.2 % of the pairs at Jaccard 0.8, 0.0003 % at 0.9), and every
removed one has a kept twin, its nearest among those compared, at or above the threshold.

Only documents that share a band with another are ever compared; their shingles lie in a file that is mapped. A band's
bucket holds kept documents only, and a document is compared with the first `_BUCKET` of them (a star above that), so
the work grows linearly. Memory: 24 bytes a document and 12 for each band that a candidate shares.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import NearDedupConfig
from data_pipeline.dedup.removed import Removal, count_removed
from data_pipeline.dedup.shingles import shingle_sets, sketch
from data_pipeline.document import Group, Mapper, Parts, map_in_order, text_buffer
from data_pipeline.progress import Meter

_BUCKET = 128
BANDS = "bands.bin"
"""Left in the stage: documents that are added later are compared without reading the old texts again."""
_SHINGLES_FILE = "shingles.work"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Buckets:
    """Which candidates share which bands; a bucket is a set of documents with an equal band."""

    candidates: NDArray[np.int64]
    """Rows that share a band with another, in the order in which they are decided."""
    borders: NDArray[np.int64]
    """Where each candidate's buckets begin in `buckets`, [candidates + 1]."""
    buckets: NDArray[np.int32]
    """Bucket numbers, candidate after candidate."""
    slots: NDArray[np.int64]
    """Where each bucket's kept members are noted, [buckets + 1]."""


def deduplicate_nearly(
    parts: Parts,
    came_in: NDArray[np.bool_],
    settings: NearDedupConfig,
    directory: Path,
    meter: Meter,
    mapper: Mapper = map_in_order,
) -> dict[str, Any]:
    """Writes which documents are removed of the rows that `came_in`, and all bands; returns the counts."""
    sketches = sketch_rows(parts, came_in, settings, directory, meter, mapper)
    return remove_among(parts, came_in, sketches, settings, directory, mapper)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sketches:
    """What is known of every row before any two are compared; rows that did not come in hold zeros."""

    bands: NDArray[np.uint64]
    """[bands, rows], a map of the file."""
    characters: NDArray[np.int64]
    text_bytes: NDArray[np.int64]
    """Of all rows."""


def sketch_rows(
    parts: Parts,
    came_in: NDArray[np.bool_],
    settings: NearDedupConfig,
    directory: Path,
    meter: Meter,
    mapper: Mapper = map_in_order,
) -> Sketches:
    """The bands of the rows that `came_in`, in a file of the directory."""
    bands_file = directory / BANDS
    with bands_file.open("wb") as opened:
        # The blocks are taken now: on a full disk, writing to a mapped hole would end the process without a word.
        os.posix_fallocate(opened.fileno(), 0, max(1, settings.bands * parts.rows * 8))
    bands = np.memmap(bands_file, dtype=np.uint64, mode="r+", shape=(settings.bands, parts.rows))
    characters = np.zeros(parts.rows, dtype=np.int64)
    sizes = np.zeros(parts.rows, dtype=np.int64)
    work = partial(_sketch_group, parts, came_in, settings)
    for group, (rows, hashes, letters, lengths) in zip(parts.groups, mapper(work, parts.groups), strict=True):
        bands[:, rows] = hashes.T
        characters[rows] = letters
        sizes[group.first_row : group.first_row + group.rows] = lengths
        meter.advance(group.text_bytes)
    bands.flush()
    return Sketches(bands=bands, characters=characters, text_bytes=sizes)


def read_bands(directory: Path, rows: int, settings: NearDedupConfig) -> NDArray[np.uint64] | None:
    """The bands that a stage left, [bands, rows]; None where it left none."""
    file = directory / BANDS
    if not file.is_file() or file.stat().st_size != settings.bands * rows * 8:
        return None
    return np.memmap(file, dtype=np.uint64, mode="r", shape=(settings.bands, rows))


def remove_among(
    parts: Parts,
    came_in: NDArray[np.bool_],
    sketches: Sketches,
    settings: NearDedupConfig,
    directory: Path,
    mapper: Mapper = map_in_order,
) -> dict[str, Any]:
    """Writes which of the rows that `came_in` are removed in favour of others of them; returns the counts."""
    buckets = _find_buckets(parts, came_in, sketches.characters, sketches.bands)
    removal = _decide(parts, buckets, settings, directory / _SHINGLES_FILE, mapper)
    removal.write(directory)
    return {
        "counts": count_removed(parts, came_in, sketches.text_bytes, removal, reason_of(settings)),
        "candidates": len(buckets.candidates),
        "threshold": settings.threshold,
        "expected_recall": 1 - (1 - settings.threshold**settings.rows) ** settings.bands,
    }


def reason_of(settings: NearDedupConfig) -> str:
    """What is said of a document that was removed."""
    return f"near-duplicates of a kept one (Jaccard >= {settings.threshold:g})"


def _sketch_group(
    parts: Parts, came_in: NDArray[np.bool_], settings: NearDedupConfig, group: Group
) -> tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Rows that came in, their bands and characters, and the bytes of every text of the batch."""
    texts = parts.read(group, ("text",)).column("text")
    places = np.flatnonzero(came_in[group.first_row : group.first_row + group.rows])
    hashes, characters = sketch(texts, places, ngram=settings.ngram, bands=settings.bands, rows_per_band=settings.rows)
    return places + group.first_row, hashes, characters, np.diff(text_buffer(texts)[1])


def _find_buckets(
    parts: Parts, came_in: NDArray[np.bool_], characters: NDArray[np.int64], bands: NDArray[np.uint64]
) -> _Buckets:
    rows = np.flatnonzero(came_in)
    members: list[NDArray[np.int64]] = []
    numbers: list[NDArray[np.int32]] = []
    sizes: list[NDArray[np.int64]] = []
    count = 0
    for band in bands:
        hashes = np.asarray(band)[rows]
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        differs = np.concatenate(([True], ordered[1:] != ordered[:-1], [True]))
        borders = np.flatnonzero(differs[: len(ordered) + 1])
        lengths = np.diff(borders)
        shared = lengths > 1
        members.append(rows[order[np.repeat(shared, lengths)]])
        numbers.append(np.repeat(np.arange(count, count + shared.sum(), dtype=np.int32), lengths[shared]))
        sizes.append(lengths[shared])
        count += int(shared.sum())
    member, number = np.concatenate(members), np.concatenate(numbers)
    candidates = np.unique(member)
    rank = _ranks(parts, candidates, characters)
    ordered_candidates = np.empty_like(candidates)
    ordered_candidates[rank] = candidates
    place = rank[np.searchsorted(candidates, member)]
    order = np.argsort(place, kind="stable")
    slots = np.zeros(count + 1, dtype=np.int64)
    np.cumsum(np.concatenate(sizes), out=slots[1:])
    return _Buckets(
        candidates=ordered_candidates,
        borders=np.searchsorted(place[order], np.arange(len(candidates) + 1)),
        buckets=number[order],
        slots=slots,
    )


def _ranks(parts: Parts, rows: NDArray[np.int64], characters: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each row in the order of decision: source, longest, id."""
    sources = parts.source_of_row()[rows].tolist()
    lengths = characters[rows].tolist()
    keys = list(zip(sources, [-length for length in lengths], parts.ids(rows), rows.tolist(), strict=True))
    rank = np.empty(len(rows), dtype=np.int64)
    rank[sorted(range(len(rows)), key=keys.__getitem__)] = np.arange(len(rows))
    return rank


def _decide(parts: Parts, buckets: _Buckets, settings: NearDedupConfig, file: Path, mapper: Mapper) -> Removal:
    """Walks the candidates in order; their shingles lie in `file` meanwhile."""
    count = len(buckets.candidates)
    starts, stops = _write_shingles(parts, buckets.candidates, settings.ngram, file, mapper)
    twin = np.full(count, -1, dtype=np.int64)
    jaccard = np.zeros(count)
    if count:
        shingles = np.memmap(file, dtype=np.uint64, mode="r")
        _select(
            shingles,
            starts,
            stops,
            buckets.borders,
            buckets.buckets,
            buckets.slots,
            settings.threshold,
            _BUCKET,
            twin,
            jaccard,
        )
        del shingles
    file.unlink()
    removed = np.flatnonzero(twin >= 0)
    order = np.argsort(buckets.candidates[removed])
    removed = removed[order]
    return Removal(
        row=buckets.candidates[removed], kept_row=buckets.candidates[twin[removed]], jaccard=jaccard[removed]
    )


def _write_shingles(
    parts: Parts, candidates: NDArray[np.int64], ngram: int, file: Path, mapper: Mapper
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Writes the shingle sets of the candidates; returns where each begins and ends, in the candidates' order."""
    place = np.argsort(candidates)
    rows = candidates[place]
    lengths = np.empty(len(rows), dtype=np.int64)
    written = 0
    groups = [group for group in parts.groups if _between(rows, group)[0] < _between(rows, group)[1]]
    with file.open("wb") as opened:
        for sets in mapper(partial(_collect_group, parts, rows, ngram), groups):
            for shingles in sets:
                opened.write(shingles.data)
                lengths[written] = len(shingles)
                written += 1
    ends = np.empty_like(lengths)
    ends[place] = np.cumsum(lengths)
    starts = np.empty_like(lengths)
    starts[place] = np.cumsum(lengths) - lengths
    return starts, ends


def _between(rows: NDArray[np.int64], group: Group) -> tuple[int, int]:
    low, high = np.searchsorted(rows, (group.first_row, group.first_row + group.rows))
    return int(low), int(high)


def _collect_group(parts: Parts, rows: NDArray[np.int64], ngram: int, group: Group) -> list[NDArray[np.uint64]]:
    low, high = _between(rows, group)
    return shingle_sets(parts.read(group, ("text",)).column("text"), rows[low:high] - group.first_row, ngram=ngram)


def jaccard_of(first: NDArray[np.uint64], second: NDArray[np.uint64], threshold: float) -> float:
    """Jaccard similarity of two sets of shingles; 0 where it cannot reach the threshold."""
    return _jaccard(first, second, threshold)


@numba.njit(nogil=True, cache=True)
def _jaccard(first, second, threshold):
    """Jaccard similarity of two sorted sets; 0 as soon as it cannot reach the threshold."""
    total = len(first) + len(second)
    if min(len(first), len(second)) < threshold * max(len(first), len(second)):
        return 0.0
    # Half a shingle less than what is needed: rounding must not give up a pair that lies on the threshold.
    spare = total - (total * threshold / (1.0 + threshold) - 0.5) * 2.0
    missed = 0
    i, j, shared = 0, 0, 0
    while i < len(first) and j < len(second):
        if first[i] == second[j]:
            shared += 1
            i += 1
            j += 1
        else:
            if first[i] < second[j]:
                i += 1
            else:
                j += 1
            missed += 1
            if missed > spare:
                return 0.0
    return shared / (total - shared)


@numba.njit(nogil=True, cache=True)
def _select(shingles, starts, stops, borders, buckets, slots, threshold, most, twin, jaccard):
    """Fills twin (candidate that is kept for a removed one, else -1) and jaccard, both [candidates]."""
    members = np.empty(slots[-1], np.int32)
    filled = np.zeros(len(slots) - 1, np.int32)
    compared = np.full(len(twin), -1, np.int32)
    for candidate in range(len(twin)):
        mine = shingles[starts[candidate] : stops[candidate]]
        best, nearest = 0.0, -1
        for place in range(borders[candidate], borders[candidate + 1]):
            bucket = buckets[place]
            first = slots[bucket]
            for slot in range(first, first + min(filled[bucket], most)):
                other = members[slot]
                if compared[other] == candidate:
                    continue
                compared[other] = candidate
                found = _jaccard(mine, shingles[starts[other] : stops[other]], threshold)
                if found > best or (found == best and found > 0.0 and other < nearest):
                    best, nearest = found, other
        if best >= threshold:
            twin[candidate] = nearest
            jaccard[candidate] = best
            continue
        for place in range(borders[candidate], borders[candidate + 1]):
            bucket = buckets[place]
            members[slots[bucket] + filled[bucket]] = candidate
            filled[bucket] += 1
