"""The build: from a configuration to a finished token store, through all stages.

    read -> clean -> exact -> near -> split -> tokenizer -> store

Contract: every stage is whole or absent and is reused while nothing that it depends on has changed (data_pipeline.
stages); a build that was killed goes on with the same command and ends with the same bytes. A finished store of
another configuration is refused, never changed, unless `overwrite` says so. What each stage kept and dropped is
printed, and stands with samples in STORE/report.json; which document stands for a removed one, and how much they
resemble each other, in STORE/clusters.parquet.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import describe, sealed
from data_pipeline.clean import clean_documents
from data_pipeline.config import DataConfig
from data_pipeline.dedup.clusters import write_clusters
from data_pipeline.dedup.exact import deduplicate_exactly
from data_pipeline.dedup.near import deduplicate_nearly
from data_pipeline.dedup.removed import Removal
from data_pipeline.document import Parts
from data_pipeline.progress import Meter, Screen
from data_pipeline.read import expected_bytes, find_source, read_sources
from data_pipeline.report import refuse_empty
from data_pipeline.sources import SourceFiles
from data_pipeline.split import Kept, sample_bytes, sample_rows, split_documents, texts_of
from data_pipeline.stages import Stage, Workspace, fingerprint_of, require_space, room_on_disk
from data_pipeline.store import TRAINING, VALIDATION, Store, StoreWriter, TokenizedDocument
from data_pipeline.tokenizer import Tokenizer, train
from parallel.common.errors import ConfigError, UserError
from parallel.common.files import write_json

_ENCODED_BYTES = 1 << 20
"""Text that is encoded at a time."""
_SMALL_BYTES = 16 << 20
"""Disk space for what does not grow with the corpus."""


def build(config: DataConfig, *, overwrite: bool = False) -> Store:
    """Builds the store of a configuration, goes on with it, or finds it finished.

    Args:
        config: What to read and what to make of it.
        overwrite: Build anew what was finished under another configuration.

    Raises:
        UserError: something that the user can mend; nothing half-written looks whole afterwards.
    """
    problems = list(config.problems())
    if problems:
        raise ConfigError(problems)
    sources = [find_source(source) for source in config.sources]
    root = Path(config.store)
    with _sole_builder(root):
        return _Build(config, sources, root).run(overwrite=overwrite)


@contextmanager
def _sole_builder(root: Path) -> Iterator[None]:
    """Makes the store's directory and keeps other builds out of it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.store is {root}, which cannot be made: {error.strerror}") from error
    names = sorted(entry.name for entry in root.iterdir())
    if names and not {sealed.STAGES, sealed.MANIFEST} & set(names):
        raise UserError(
            f"data.store is {root}, which holds other files ({names[0]}): expected a new or empty directory"
        )
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"another `bloomery data build` is at work in {root}: wait for it, or stop it") from error
    try:
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Documents:
    """The cleaned documents, and which of them are still kept."""

    parts: Parts
    kept: NDArray[np.bool_]
    removals: dict[str, Removal]
    """What each deduplicating stage took out."""
    fingerprint: str
    """Of the last stage that had a say."""


class _Build:
    """One build: the stages in order, their lines, the report."""

    def __init__(self, config: DataConfig, sources: Sequence[SourceFiles], root: Path) -> None:
        self._config = config
        self._sources = sources
        self._root = root
        self._screen = Screen()
        self._settings = sealed.settings_of(config)
        self._report: dict[str, dict[str, Any]] = {}

    def run(self, *, overwrite: bool) -> Store:
        """All stages, or none where the store is finished."""
        finished = sealed.find(self._root, self._settings, self._sources, overwrite=overwrite)
        if finished is not None:
            for stage, outcome in finished.report["stages"].items():
                self._say(stage, outcome, reused=True)
            return finished.store
        for leftover in self._root.glob(".*.tmp"):
            leftover.unlink()
        self._workspace = Workspace(self._root / sealed.STAGES)
        documents = self._without_near_duplicates(self._without_copies(self._read_and_clean()))
        split = self._split(documents)
        tokenizer = self._tokenizer(documents.parts, split)
        return self._store(documents, split, tokenizer)

    def _run(
        self, stage: str, inputs: list[str], work: Callable[[Path, Meter], dict[str, Any]], *, total: int, needed: int
    ) -> Stage:
        """One stage with its meter (`total` bytes of text), its line and its place in the report."""

        def metered(directory: Path) -> dict[str, Any]:
            with self._screen.meter(stage, total) as meter:
                return work(directory, meter)

        fingerprint = fingerprint_of(stage, self._settings[stage], inputs)
        done = self._workspace.run(stage, fingerprint, metered, needed_bytes=needed + _SMALL_BYTES)
        self._say(stage, done.outcome, reused=done.reused)
        return done

    def _say(self, stage: str, outcome: dict[str, Any], *, reused: bool) -> None:
        self._report[stage] = {key: value for key, value in outcome.items() if key != "groups"}
        self._screen.line(stage, describe.line(stage, outcome) + (" (as before)" if reused else ""))

    def _read_and_clean(self) -> _Documents:
        expected = expected_bytes(self._sources)
        read = self._run(
            "read",
            [sealed.state_of(self._sources)],
            lambda directory, meter: read_sources(self._sources, directory, meter),
            total=expected,
            needed=expected // 2,
        )
        refuse_empty("read", read.outcome["counts"], every_source=True, hint=describe.fields_hint(read.outcome))
        raw = Parts(read.directory, read.outcome["groups"])
        cleaned = self._run(
            "clean",
            [read.outcome["digest"]],
            lambda directory, meter: clean_documents(raw, directory, self._config.stages.clean, meter),
            total=raw.text_bytes,
            needed=raw.text_bytes // 2,
        )
        refuse_empty("clean", cleaned.outcome["counts"], every_source=True)
        parts = Parts(cleaned.directory, cleaned.outcome["groups"])
        everything = np.ones(parts.rows, dtype=bool)
        return _Documents(parts=parts, kept=everything, removals={}, fingerprint=cleaned.fingerprint)

    def _without_copies(self, documents: _Documents) -> _Documents:
        if not self._config.stages.exact_dedup:
            return documents
        parts = documents.parts
        done = self._run(
            "exact",
            [documents.fingerprint],
            lambda directory, meter: deduplicate_exactly(parts, directory, meter),
            total=parts.text_bytes,
            needed=parts.rows * 24,
        )
        return _after(documents, done, "exact")

    def _without_near_duplicates(self, documents: _Documents) -> _Documents:
        settings = self._config.stages.near_dedup
        if not settings.enabled:
            return documents
        parts, kept = documents.parts, documents.kept
        done = self._run(
            "near",
            [documents.fingerprint],
            lambda directory, meter: deduplicate_nearly(parts, kept, settings, directory, meter),
            total=parts.text_bytes,
            needed=parts.rows * settings.bands * 8 + parts.text_bytes,
        )
        return _after(documents, done, "near")

    def _split(self, documents: _Documents) -> Stage:
        parts, kept, share = documents.parts, documents.kept, self._config.validation.share
        return self._run(
            "split",
            [documents.fingerprint],
            lambda directory, meter: split_documents(parts, kept, share, directory, meter),
            total=parts.text_bytes,
            needed=parts.rows * 32,
        )

    def _tokenizer(self, parts: Parts, split: Stage) -> Stage:
        """The user's tokenizer, or one trained on a sample."""
        settings, mixture = self._config.tokenizer, self._config.mixture

        def trained(directory: Path, meter: Meter) -> dict[str, Any]:
            kept = Kept.read(split.directory)
            rows = sample_rows(kept, parts.sources, mixture, settings.sample_bytes)
            if not len(rows):
                raise UserError(
                    f"no training document fits into data.tokenizer.sample_bytes = {settings.sample_bytes}: raise it"
                )
            tokenizer = train(_metered(parts, rows, meter), settings.vocabulary_size, directory / "tokenizer.json")
            taken = sample_bytes(kept, parts.sources, rows)
            return {"vocabulary_size": tokenizer.vocabulary_size, "sample_bytes": taken}

        def given(directory: Path, _: Meter) -> dict[str, Any]:
            tokenizer = Tokenizer.load(Path(str(settings.path)).expanduser())
            tokenizer.save(directory / "tokenizer.json")
            return {"vocabulary_size": tokenizer.vocabulary_size, "given": True}

        # A tokenizer that is given does not depend on the corpus.
        inputs, work = ([split.fingerprint], trained) if settings.path is None else ([], given)
        return self._run("tokenizer", inputs, work, total=settings.sample_bytes, needed=_SMALL_BYTES)

    def _store(self, documents: _Documents, split: Stage, tokenizer_stage: Stage) -> Store:
        parts = documents.parts
        kept = Kept.read(split.directory)
        tokenizer = Tokenizer.load(tokenizer_stage.directory / "tokenizer.json")
        inputs = [split.fingerprint, tokenizer_stage.fingerprint]
        configuration = fingerprint_of("store", self._settings["store"], inputs)
        if sealed.begun_under(self._root) not in (None, configuration):
            sealed.remove(self._root)
        text_bytes = int(kept.text_bytes.sum())
        require_space(self._root, text_bytes + _SMALL_BYTES, "store")
        writer = StoreWriter(self._root, tokenizer=tokenizer, configuration=configuration)
        with self._screen.meter("store", text_bytes) as meter:
            for number, source in enumerate(parts.sources):
                for name, chosen in ((TRAINING, ~kept.validation), (VALIDATION, kept.validation)):
                    rows = kept.row[chosen & (kept.source == number)]
                    rows = rows[writer.documents_written(source, name) :]
                    encoded = _encoded(parts, rows, tokenizer, meter)
                    while writer.add_shard(source, name, encoded, max_tokens=self._config.shard_tokens):
                        pass
        self._say("store", sealed.store_outcome(writer.shards, parts.sources), reused=False)
        with room_on_disk(self._root / sealed.REPORT, "store"):
            write_clusters(parts, documents.removals, self._root / sealed.CLUSTERS)
            write_json(self._root / sealed.REPORT, sealed.report_of(self._settings, self._sources, self._report))
        return writer.finish()


def _after(documents: _Documents, done: Stage, stage: str) -> _Documents:
    """The documents that a deduplicating stage left."""
    removal = Removal.read(done.directory)
    kept = documents.kept.copy()
    kept[removal.row] = False
    removals = {**documents.removals, stage: removal}
    return _Documents(parts=documents.parts, kept=kept, removals=removals, fingerprint=done.fingerprint)


def _metered(parts: Parts, rows: NDArray[np.int64], meter: Meter) -> Iterator[str]:
    for batch in texts_of(parts, rows):
        for _, text in batch:
            meter.advance(len(text))
            yield text


def _encoded(parts: Parts, rows: NDArray[np.int64], tokenizer: Tokenizer, meter: Meter) -> Iterator[TokenizedDocument]:
    """Documents on their way into the store, about a MiB encoded at a time."""
    for batch in texts_of(parts, rows):
        sizes = [len(text.encode()) for _, text in batch]
        portions = np.cumsum(sizes) // _ENCODED_BYTES
        borders = [0, *(np.flatnonzero(np.diff(portions)) + 1).tolist(), len(batch)]
        for start, stop in pairwise(borders):
            encoded = tokenizer.encode_batch([text for _, text in batch[start:stop]])
            for (identifier, _), tokens, size in zip(batch[start:stop], encoded, sizes[start:stop], strict=True):
                yield TokenizedDocument(id=identifier, tokens=tokens, text_bytes=size)
            meter.advance(sum(sizes[start:stop]))
