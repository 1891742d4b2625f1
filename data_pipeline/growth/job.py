"""`data grow`: a store that grows by sealed shards while training may already follow it.

    STORE/growth/00000/ 00001/ ...   portions: what was kept, and how far the sources were read (growth.portion)
          growth/index/              what was seen, made anew from the portions where it is lost (dedup.index)
          growth/settings.json       what may not change while it grows
          shard-*                    one a portion, source and split, each a window of its own

Contract: a portion is committed first, then put into the index, then tokenised and sealed. Each of the three follows
from the one before, so a job that is killed at any moment goes on with the same command: no document is lost, none
comes twice, and the finished store has the same bytes. Growing begins empty, or behind a store that `data build`
finished: then its documents are in the index, from the bands and digests that the build left, and no old text is read
but that of candidates. Sources of a build cannot grow, because their passes would change under a run; new documents
come under a name of their own.

The tokenizer is the store's, the user's, or trained on the first portion.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from data_pipeline import sealed
from data_pipeline.build import seal, sole_builder
from data_pipeline.config import DataConfig, IndexKind
from data_pipeline.dedup.exact import DIGESTS, hash_texts
from data_pipeline.dedup.index import Index
from data_pipeline.dedup.near import read_bands, sketch_rows
from data_pipeline.document import Mapper, Parts
from data_pipeline.encoder import Encoder
from data_pipeline.engine import open_engine
from data_pipeline.growth.archive import Archive
from data_pipeline.growth.cursor import Cursor
from data_pipeline.growth.portion import Portion, Work, id_hash, merged
from data_pipeline.progress import Screen
from data_pipeline.report import Tally, kept, kept_and_dropped
from data_pipeline.split import Kept, sample_rows, texts_of
from data_pipeline.stages import fingerprint_of, room_on_disk
from data_pipeline.store import TRAINING, VALIDATION, Store, StoreWriter
from data_pipeline.tokenizer import Tokenizer, train
from parallel.common.errors import ConfigError, Problem, UserError
from parallel.common.files import atomic_writer, write_json
from parallel.common.units import format_count, format_duration

_LOOK_SECONDS = 1.0


def grow(config: DataConfig) -> Store:
    """Grows the store of a configuration until its sources are read, or goes on with that.

    Raises:
        UserError: something that the user can mend; what was committed stays.
    """
    problems = list(config.problems())
    if problems:
        raise ConfigError(problems)
    root = Path(config.store)
    with sole_builder(root), room_on_disk(root / sealed.GROWTH, "grow"), open_engine(config.engine) as mapper:
        return _Growth(config, root, mapper).run()


class _Growth:
    def __init__(self, config: DataConfig, root: Path, mapper: Mapper) -> None:
        self._config = config
        self._root = root
        self._directory = root / sealed.GROWTH
        self._screen = Screen()
        self._mapper = mapper
        self._archive = Archive()
        self._portions: list[Portion] = []
        self._writer: StoreWriter | None = None

    def run(self) -> Store:
        """All that is left to do."""
        base = _base(self._root)
        self._refuse_changes(base)
        self._directory.mkdir(exist_ok=True)
        self._index = Index(self._directory / "index", self._config.grow, self._config.stages.near_dedup.bands)
        try:
            self._take_up(base)
            self._grow()
            return self._finish(base)
        finally:
            self._index.close()

    def _refuse_changes(self, base: Parts | None) -> None:
        """Stages, tokenizer and split may not change while a store grows; sources may come."""
        settings = sealed.settings_of(self._config)
        wanted = {name: value for name, value in settings.items() if name not in ("read", "store")}
        wanted["grow"] = {**asdict(self._config.grow), "index": self._config.grow.index.value, "idle_seconds": 0.0}
        if base is not None:
            del wanted["tokenizer"]
            names = [source.name for source in self._config.sources if source.name in base.sources]
            if names:
                legal = (
                    f"names that the build did not use: {', '.join(names)} would change under a run that trains on it"
                )
                raise ConfigError([Problem(key="data.sources", got=names, legal=legal)])
        file = self._directory / "settings.json"
        if not file.is_file():
            self._directory.mkdir(exist_ok=True)
            write_json(file, wanted)
        before = json.loads(file.read_bytes())
        changed = [
            name for name in {**before, **wanted} if before.get(name) != json.loads(json.dumps(wanted)).get(name)
        ]
        if changed:
            raise UserError(
                f"{self._root} has begun to grow under another configuration (changed: {', '.join(sorted(changed))}): "
                f"take that back, or give another data.store"
            )

    def _take_up(self, base: Parts | None) -> None:
        """What was done before: the build's documents and the portions, all of them in the index."""
        for number, directory in enumerate(sorted(self._directory.glob("[0-9]*"))):
            if directory.name != f"{number:05d}":
                raise UserError(f"{self._directory / f'{number:05d}'} is missing: the growing store is damaged")
            self._portions.append(Portion.read(directory))
        added = self._index.added
        if base is not None:
            first = self._archive.append(base)
            if not added:
                self._add_base(base, first)
        for number, portion in enumerate(self._portions, start=1):
            first = self._archive.append(portion.parts)
            if number >= added:
                portion.add_to(self._index, number, first)

    def _add_base(self, base: Parts, first: int) -> None:
        """The build's kept documents, from what its stages left; where they left nothing, from its texts."""
        stages, settings = self._root / sealed.STAGES, self._config.stages.near_dedup
        rows = Kept.read(stages / "split").row
        with self._screen.meter("index", base.text_bytes) as meter, room_on_disk(self._directory / "x", "index"):
            bands = read_bands(stages / "near", base.rows, settings)
            if bands is None and settings.enabled:
                everything = np.ones(base.rows, dtype=bool)
                bands = sketch_rows(base, everything, settings, self._directory, meter, self._mapper).bands
            digests = _digests(stages / "exact" / DIGESTS, base)
            names = np.array(base.sources, dtype=object)[base.source_of_row()[rows]]
            hashes = [id_hash(*pair) for pair in zip(names, base.ids(rows), strict=True)]
            chosen = np.zeros((settings.bands, len(rows)), np.uint64) if bands is None else bands[:, rows]
            ids = np.array(hashes, dtype=np.uint64)
            self._index.add(0, ids, digests[rows], np.ascontiguousarray(chosen), rows=(rows + first).tolist())
        self._screen.line("index", f"{len(rows):,} documents of the finished store")

    def _grow(self) -> None:
        """Portion after portion, until no document comes."""
        tally = Tally(source.name for source in self._config.sources)
        cursors = [
            Cursor(source, [p.places[source.name] for p in self._portions if source.name in p.places], tally)
            for source in self._config.sources
        ]
        if self._portions:
            self._seal()
        while True:
            before = sum(portion.facts["documents"] for portion in self._portions)
            total = self._config.grow.portion_bytes * len(cursors)
            with self._screen.meter("portion", total) as meter:
                work = Work(self._config, self._index, self._archive, meter, self._mapper)
                portion = work.make(cursors, self._directory, len(self._portions), before)
            if portion is None:
                if not self._wait(cursors):
                    return
                continue
            self._portions.append(portion)
            first = self._archive.append(portion.parts)
            portion.add_to(self._index, len(self._portions), first)
            self._say(portion)
            self._seal()

    def _wait(self, cursors: list[Cursor]) -> bool:
        """Whether new files came in time."""
        limit = self._config.grow.idle_seconds
        if limit:
            self._screen.line("grow", f"everything is read: waiting up to {format_duration(limit)} for new files")
        begun = time.monotonic()
        while True:
            if sum(cursor.look_again() for cursor in cursors):
                return True
            if time.monotonic() - begun >= limit:
                return False
            time.sleep(min(_LOOK_SECONDS, limit))

    def _say(self, portion: Portion) -> None:
        stages = portion.facts["stages"]
        came = kept(stages["read"])[0]
        text = f"{came:,} documents came, {portion.parts.rows:,} are new"
        for stage in ("clean", "filters", "decontaminate", "exact", "near"):
            if stage in stages:
                text += f"; {stage} {kept_and_dropped(stages[stage]).partition('; ')[2]}"
        if self._config.grow.index is IndexKind.bloom:
            text += f"; the Bloom filters now drop {self._index.filled:.1e} of the new by chance"
        self._screen.line(f"portion {len(self._portions) - 1}", text)

    def _seal(self) -> None:
        """Shards of all portions that have none yet."""
        if self._writer is None:
            tokenizer = self._tokenizer()
            if tokenizer is None:
                return
            configuration = fingerprint_of("store", "grow", [])
            self._writer = StoreWriter(self._root, tokenizer=tokenizer, configuration=configuration, grow=True)
            self._encoder = Encoder(tokenizer, self._config.tokenizer.encoder)
            self._sealed = 0
            self._documents: dict[tuple[str, str], int] = {}
        writer = self._writer
        for portion in self._portions[self._sealed :]:
            parts = portion.parts
            for number, source in enumerate(parts.sources):
                rows = np.flatnonzero(parts.source_of_row() == number)
                held = _held_out(parts, rows, self._config.validation.share)
                for split, chosen in ((TRAINING, rows[~held]), (VALIDATION, rows[held])):
                    before = self._documents.get((source, split), 0)
                    self._documents[source, split] = before + len(chosen)
                    with self._screen.meter("tokens", parts.text_bytes) as meter:
                        seal(
                            writer, parts, chosen, self._encoder, meter, source, split,
                            max_tokens=self._config.shard_tokens, before=before, window=True,
                        )  # fmt: skip
            self._sealed += 1

    def _tokenizer(self) -> Tokenizer | None:
        """The store's, else the user's, else one trained on the first portion that kept something."""
        if (self._root / "tokenizer.json").is_file():
            return Tokenizer.load(self._root / "tokenizer.json")
        settings = self._config.tokenizer
        if settings.path is not None:
            return Tokenizer.load(Path(settings.path).expanduser())
        parts = next((portion.parts for portion in self._portions if portion.parts.rows), None)
        if parts is None:
            return None
        everything = np.arange(parts.rows)
        held = _held_out(parts, everything, self._config.validation.share)
        sizes = np.concatenate([np.array([len(text.encode()) for _, text in b]) for b in texts_of(parts, everything)])
        hashes = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in parts.ids(everything)], np.uint64)
        table = Kept(row=everything, source=parts.source_of_row(), text_bytes=sizes, hash=hashes, validation=held)
        rows = sample_rows(table, parts.sources, self._config.weights, settings.sample_bytes)
        texts = (text for batch in texts_of(parts, rows) for _, text in batch)
        self._screen.line("tokenizer", f"trained on {len(rows):,} documents of the first portion")
        return train(texts, settings.vocabulary_size, self._directory / "tokenizer.json")

    def _finish(self, base: Parts | None) -> Store:
        if self._writer is None:
            what = "no new document was left" if base is not None else "the corpus is empty: no document was left"
            if base is None:
                raise UserError(f"{what} after all stages")
            self._screen.line("grow", what)
            return Store.open(self._root)
        stages = [portion.facts["stages"] for portion in self._portions]
        names = list(dict.fromkeys(name for counts in stages for name in counts))
        report: dict[str, Any] = {
            "format": 1,
            "portions": len(self._portions),
            "stages": {
                name: {"counts": merged([counts[name] for counts in stages if name in counts])} for name in names
            },
        }
        with room_on_disk(self._directory / "report.json", "grow"):
            write_json(self._directory / "report.json", report)
            with atomic_writer(self._directory / sealed.CLUSTERS) as file:
                tables = pa.concat_tables([portion.removed() for portion in self._portions])
                pq.write_table(tables, file, compression="zstd")
        store = self._writer.finish()
        tokens = sum(shard.tokens for shard in store.shards())
        self._screen.line("store", f"{format_count(tokens)} tokens in {len(store.shards()):,} shards")
        return store


def _base(root: Path) -> Parts | None:
    """The documents of the build that the store began with; None where it began by growing.

    Raises:
        UserError: a build is there that has not finished, or its stages were removed.
    """
    if not (root / sealed.STAGES).is_dir():
        if (root / sealed.MANIFEST).is_file() and not (root / sealed.GROWTH).is_dir():
            raise UserError(f"{root} has no stages, by which new documents could be compared: build it again")
        return None
    if not (root / sealed.REPORT).is_file():
        raise UserError(f"{root} is not finished: run `bloomery data build` again, it goes on; then let it grow")
    stages = sealed.Workspace(root / sealed.STAGES)
    done = stages.find("filters") or stages.find("clean")
    if done is None:
        raise UserError(f"{root / sealed.STAGES} is damaged: build the store again")
    return Parts(done.directory, done.outcome["groups"])


def _digests(file: Path, base: Parts) -> NDArray[np.uint64]:
    if file.is_file():
        return np.load(file, allow_pickle=False)
    return np.concatenate([hash_texts(base.read(group, ("text",)).column("text")) for group in base.groups])


def _held_out(parts: Parts, rows: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Documents of some rows that are kept for validation, by the hash of their id as in a build; [rows]."""
    hashes = np.array([xxhash.xxh3_64_intdigest(name.encode()) for name in parts.ids(rows)], dtype=np.uint64)
    return hashes < np.uint64(int(share * 2.0**64))
