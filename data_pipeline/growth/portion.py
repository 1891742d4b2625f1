"""One portion of a growing store: a piece of every source, through all stages, against everything seen before.

    read -> clean -> filters -> decontaminate -> exact and near against the index, then among themselves -> kept

Contract: a portion is a directory that is whole or absent (it is renamed into place), with the kept documents, their
bands and digests, who was removed for whom, counts, and the places up to which the sources were read. It follows from
the places before it and the portions before it alone.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from data_pipeline.clean import clean_documents
from data_pipeline.config import DataConfig, IndexKind
from data_pipeline.decontaminate import decontaminate_documents, removed_rows
from data_pipeline.dedup import exact, near
from data_pipeline.dedup.index import Index
from data_pipeline.dedup.removed import Removal
from data_pipeline.document import BATCH_BYTES, Group, Mapper, Parts, PartWriter, batch_of, save_array, text_buffer
from data_pipeline.filters.stage import filter_documents
from data_pipeline.growth.archive import Archive
from data_pipeline.growth.cursor import Cursor, Place
from data_pipeline.progress import Meter
from data_pipeline.read import DUPLICATE_IDS
from data_pipeline.report import Tally
from data_pipeline.stages import commit_directory, room_on_disk

MANIFEST = "manifest.json"
_BANDS, _DIGESTS, _IDS, _REMOVED = "bands.npy", "digests.npy", "ids.npy", "removed.parquet"
_COLUMNS = ("removed_id", "kept_id", "jaccard", "removed_source", "kept_source", "stage")


def id_hash(source: str, identifier: str) -> int:
    """What the index knows an id by."""
    return xxhash.xxh3_64_intdigest(f"{source}\0{identifier}".encode())


@dataclass(frozen=True, kw_only=True, slots=True)
class Portion:
    """A committed portion."""

    directory: Path
    facts: dict[str, Any]
    """What its manifest says."""

    @classmethod
    def read(cls, directory: Path) -> "Portion":
        return cls(directory=directory, facts=json.loads((directory / MANIFEST).read_bytes()))

    @property
    def parts(self) -> Parts:
        """Its kept documents."""
        return Parts(self.directory, self.facts["groups"])

    @property
    def places(self) -> dict[str, Place]:
        """Where its sources were when it ended."""
        return {name: Place(**place) for name, place in self.facts["places"].items()}

    def add_to(self, index: Index, number: int, first_row: int) -> None:
        """Puts its kept documents into the index."""
        arrays = [np.load(self.directory / name) for name in (_IDS, _DIGESTS, _BANDS)]
        index.add(number, *arrays, rows=range(first_row, first_row + len(arrays[0])))

    def removed(self) -> pa.Table:
        """Who was removed for whom, with the columns of clusters.parquet."""
        return pq.read_table(self.directory / _REMOVED, page_checksum_verification=True)


class Work:
    """What is done to make a portion."""

    def __init__(self, config: DataConfig, index: Index, archive: Archive, meter: Meter, mapper: Mapper) -> None:
        self._config = config
        self._index = index
        self._archive = archive
        self._meter = meter
        self._mapper = mapper

    def make(self, cursors: Sequence[Cursor], directory: Path, number: int, read_before: int) -> Portion | None:
        """Reads and works on the next portion and commits it; None where no document came.

        Args:
            cursors: The sources, each at its place.
            directory: Of all portions.
            number: Of this one.
            read_before: Documents read before, which numbers those whose id was there already.
        """
        partial = directory / f".{number:05d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with room_on_disk(partial, "grow"):
            partial.mkdir(parents=True)
            facts: dict[str, Any] = {"stages": {}}
            read = self._read(cursors, _made(partial / "read"), facts, read_before)
            if not facts["documents"] and not any(place["finished"] for place in facts["places"].values()):
                shutil.rmtree(partial)
                return None
            self._keep(read, partial, facts)
            for leftover in [path for path in partial.iterdir() if path.is_dir()]:
                shutil.rmtree(leftover)
            commit_directory(partial, directory / f"{number:05d}", facts)
        return Portion.read(directory / f"{number:05d}")

    def _read(self, cursors: Sequence[Cursor], directory: Path, facts: dict[str, Any], before: int) -> Parts:
        tally = Tally(cursor.config.name for cursor in cursors)
        writer = PartWriter(directory)
        ids_in_portion: set[int] = set()
        count = repeated = 0
        for cursor in cursors:
            cursor.count_into(tally)
            name, total = cursor.config.name, 0
            held: list[tuple[str, str]] = []
            held_bytes = 0
            while total < self._config.grow.portion_bytes and (document := cursor.next()) is not None:
                identifier, text, raw = document
                if id_hash(name, identifier) in ids_in_portion or self._knows(name, identifier):
                    identifier, repeated = f"{identifier}~{before + count}", repeated + 1
                ids_in_portion.add(id_hash(name, identifier))
                count += 1
                total += len(raw)
                held.append((identifier, text))
                held_bytes += len(raw)
                if held_bytes >= BATCH_BYTES:
                    writer.write(name, batch_of(*zip(*held, strict=True)))
                    held, held_bytes = [], 0
                    self._meter.advance(0)
            if held:
                writer.write(name, batch_of(*zip(*held, strict=True)))
        pq.write_table(pa.table({"row": pa.array([], pa.int64())}), directory / DUPLICATE_IDS)
        facts["places"] = {cursor.config.name: cursor.place.to_json() for cursor in cursors}
        facts["documents"] = count
        facts["repeated_ids"] = repeated
        facts["stages"]["read"] = tally.to_json()
        return Parts(directory, writer.close())

    def _knows(self, source: str, identifier: str) -> bool:
        return bool(self._index.known_ids(np.array([id_hash(source, identifier)], dtype=np.uint64))[0])

    def _keep(self, read: Parts, partial: Path, facts: dict[str, Any]) -> None:
        """All stages after reading, and the files of the portion."""
        stages, counts = self._config.stages, facts["stages"]
        outcome = clean_documents(read, _made(partial / "clean"), stages.clean, self._meter, self._mapper)
        parts, counts["clean"] = Parts(partial / "clean", outcome["groups"]), outcome["counts"]
        if stages.filters.enabled:
            sources = {source.name: source for source in self._config.sources}
            outcome = filter_documents(
                parts, _made(partial / "filters"), stages.filters, sources, self._meter, self._mapper
            )
            parts, counts["filters"] = Parts(partial / "filters", outcome["groups"]), outcome["counts"]
        kept = np.ones(parts.rows, dtype=bool)
        if stages.decontaminate.files and parts.rows:
            place = _made(partial / "decontaminate")
            outcome = decontaminate_documents(parts, kept, stages.decontaminate, place, self._meter, self._mapper)
            kept[removed_rows(place)] = False
            counts["decontaminate"] = outcome["counts"]
        removed: list[dict[str, list[Any]]] = []
        digests = np.zeros((parts.rows, 2), dtype=np.uint64)
        if stages.exact_dedup and parts.rows:
            digests = self._without_copies(parts, kept, _made(partial / "exact"), removed, counts)
        bands = np.zeros((stages.near_dedup.bands, parts.rows), dtype=np.uint64)
        if stages.near_dedup.enabled and parts.rows:
            bands = self._without_likes(parts, kept, _made(partial / "near"), removed, counts)
        self._write(parts, kept, digests, bands, removed, partial, facts)

    def _without_copies(
        self, parts: Parts, kept: NDArray[np.bool_], place: Path, removed: list, counts: dict[str, Any]
    ) -> NDArray[np.uint64]:
        """Takes out texts that were seen before, then copies among the new ones; the digests of all."""
        outcome = exact.deduplicate_exactly(parts, place, self._meter, self._mapper, kept)
        digests = np.load(place / exact.DIGESTS)
        known = self._index.rows_of_texts(digests)
        old = np.flatnonzero((known >= 0) & kept)
        removed.append(self._rows(parts, old, known[old], np.ones(len(old)), "exact", archived=True))
        kept[old] = False
        # Copies of a text that was seen before went with it; of the others the first stays.
        among = Removal.read(place)
        fresh = kept[among.row] & kept[among.kept_row]
        chosen = Removal(row=among.row[fresh], kept_row=among.kept_row[fresh], jaccard=among.jaccard[fresh])
        removed.append(self._rows(parts, chosen.row, chosen.kept_row, chosen.jaccard, "exact"))
        kept[chosen.row] = False
        counts["exact"] = _counted(outcome["counts"], parts, kept, [old, chosen.row], exact.REASON)
        return digests

    def _without_likes(
        self, parts: Parts, kept: NDArray[np.bool_], place: Path, removed: list, counts: dict[str, Any]
    ) -> NDArray[np.uint64]:
        """Takes out what resembles a document seen before, then likes among the new ones; the bands of all."""
        settings = self._config.stages.near_dedup
        sketches = near.sketch_rows(parts, kept, settings, place, self._meter, self._mapper)
        rows = np.flatnonzero(kept)
        mine = np.ascontiguousarray(sketches.bands[:, rows])
        if self._config.grow.index is IndexKind.bloom:
            found = rows[self._index.seen(mine)]
            old, twins, jaccard = found, np.full(len(found), -1), np.full(len(found), np.nan)
        else:
            old, twins, jaccard = self._resembling(parts, rows, mine)
        removed.append(self._rows(parts, old, twins, jaccard, "near", archived=True))
        kept[old] = False
        outcome = near.remove_among(parts, kept, sketches, settings, place, self._mapper)
        among = Removal.read(place)
        removed.append(self._rows(parts, among.row, among.kept_row, among.jaccard, "near"))
        kept[among.row] = False
        counts["near"] = _counted(outcome["counts"], parts, kept, [old, among.row], near.reason_of(settings))
        return sketches.bands

    def _resembling(
        self, parts: Parts, rows: NDArray[np.int64], bands: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Rows whose exact similarity to a kept document reaches the threshold, that document, and the similarity."""
        settings = self._config.stages.near_dedup
        places, seen = self._index.candidates(bands)
        if not len(places):
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        old = self._archive.shingles(seen, settings.ngram)
        own = Archive()
        own.append(parts)
        new = own.shingles(rows[np.unique(places)], settings.ngram)
        best: dict[int, tuple[float, int]] = {}
        for place, row in zip(rows[places].tolist(), seen.tolist(), strict=True):
            similarity = near.jaccard_of(new[place], old[row], settings.threshold)
            if similarity >= settings.threshold and similarity > best.get(place, (0.0, 0))[0]:
                best[place] = similarity, row
        found = np.array(sorted(best), dtype=np.int64)
        twins = np.array([best[place][1] for place in found.tolist()], dtype=np.int64)
        return found, twins, np.array([best[place][0] for place in found.tolist()], dtype=np.float64)

    def _rows(
        self, parts: Parts, rows: NDArray[np.int64], twins: NDArray[np.int64], jaccard: NDArray[np.float64],
        stage: str, *, archived: bool = False,
    ) -> dict[str, list[Any]]:  # fmt: skip
        """The columns of clusters.parquet for some removed rows; the twin of one that a Bloom filter dropped is ''."""
        names = parts.sources
        sources = parts.source_of_row()
        if archived:
            known = iter(self._archive.ids(twins[twins >= 0])) if len(twins) else iter(())
            kept = [next(known) if twin >= 0 else ("", "") for twin in twins.tolist()]
        else:
            places = sources[twins].tolist()
            kept = list(zip(parts.ids(twins), (names[place] for place in places), strict=True))
        return {
            "removed_id": parts.ids(rows),
            "kept_id": [identifier for identifier, _ in kept],
            "jaccard": jaccard.tolist(),
            "removed_source": [names[number] for number in sources[rows].tolist()],
            "kept_source": [source for _, source in kept],
            "stage": [stage] * len(rows),
        }

    def _write(
        self, parts: Parts, kept: NDArray[np.bool_], digests: NDArray[np.uint64], bands: NDArray[np.uint64],
        removed: list[dict[str, list[Any]]], partial: Path, facts: dict[str, Any],
    ) -> None:  # fmt: skip
        writer = PartWriter(partial)
        hashes: list[int] = []
        for group in parts.groups:
            batch = parts.read(group).filter(pa.array(kept[group.first_row : group.first_row + group.rows]))
            writer.write(group.source, batch)
            hashes += [id_hash(group.source, identifier) for identifier in batch.column("id").to_pylist()]
        facts["groups"] = writer.close()
        save_array(partial / _IDS, np.array(hashes, dtype=np.uint64))
        save_array(partial / _DIGESTS, digests[kept])
        save_array(partial / _BANDS, bands[:, kept])
        columns = {name: [value for table in removed for value in table[name]] for name in _COLUMNS}
        kinds = {name: pa.float64() if name == "jaccard" else pa.string() for name in _COLUMNS}
        table = pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
        pq.write_table(table, partial / _REMOVED, compression="zstd", write_page_checksum=True)


def _counted(
    counts: dict[str, Any], parts: Parts, kept: NDArray[np.bool_], gone: Sequence[NDArray[np.int64]], reason: str
) -> dict[str, Any]:
    """The counts of a stage whose removals come from two places: from the index, and from among the new documents."""
    sizes = np.concatenate([np.diff(_borders(parts, group)) for group in parts.groups])
    sources = parts.source_of_row()
    left = np.concatenate(gone)
    tally = Tally(parts.sources)
    for number, source in enumerate(parts.sources):
        here = sources == number
        tally.keep(source, int((kept & here).sum()), int(sizes[kept & here].sum()))
        lost = left[here[left]]
        if len(lost):
            tally.drop_many(source, reason, len(lost), int(sizes[lost].sum()))
    return {**tally.to_json(), "samples": counts["samples"]}


def _borders(parts: Parts, group: Group) -> NDArray[np.int64]:
    return text_buffer(parts.read(group, ("text",)).column("text"))[1]


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def merged(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The counts of one stage over several portions."""
    sources = list(dict.fromkeys(source for counts in stages for source in counts["sources"]))
    tally = Tally(sources)
    samples: dict[str, list[Any]] = {}
    for counts in stages:
        for source, entry in counts["sources"].items():
            tally.keep(source, entry["kept"]["documents"], entry["kept"]["text_bytes"])
            for reason, lost in entry["dropped"].items():
                tally.drop_many(source, reason, lost["documents"], lost["text_bytes"])
        for reason, shown in counts["samples"].items():
            samples.setdefault(reason, []).extend(shown)
    return {**tally.to_json(), "samples": {reason: shown[:3] for reason, shown in sorted(samples.items())}}
