"""The build: from a configuration to a finished token store, through all stages.

    documents (data_pipeline.pipeline) -> split -> tokenizer -> store

Contract: every stage is whole or absent and is reused while nothing that it depends on has changed (data_pipeline.
stages); a build that was killed goes on with the same command and ends with the same bytes. A finished store of
another configuration is refused, never changed, unless `overwrite` says so. What each stage kept and dropped is
printed, and stands with samples in STORE/report.json; which document stands for a removed one, and how much they
resemble each other, in STORE/clusters.parquet.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import sealed
from data_pipeline.config import DataConfig
from data_pipeline.dedup.clusters import write_clusters
from data_pipeline.document import Parts
from data_pipeline.encoder import Encoder, EncodersDiffer
from data_pipeline.engine import open_engine
from data_pipeline.pipeline import SMALL_BYTES, Documents, Pipeline
from data_pipeline.progress import Meter
from data_pipeline.read import find_source
from data_pipeline.split import Kept, sample_bytes, sample_rows, split_documents, texts_of
from data_pipeline.stages import Stage, fingerprint_of, require_space, room_on_disk
from data_pipeline.store import TRAINING, VALIDATION, Store, StoreWriter, TokenizedDocument
from data_pipeline.tokenizer import Tokenizer, train
from parallel.common.errors import ConfigError, UserError
from parallel.common.files import write_json

_ENCODED_BYTES = 1 << 20
"""Text that is encoded at a time."""


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
    with sole_builder(root), open_engine(config.engine) as mapper:
        return _Build(config, Pipeline(config, sources, root / sealed.STAGES, mapper), root).run(overwrite=overwrite)


def train_tokenizer(config: DataConfig) -> Path:
    """The stages of a configuration up to its tokenizer, in `data.store`; where the tokenizer.json lies.

    Raises:
        UserError: something that the user can mend.
    """
    problems = list(config.problems())
    if problems:
        raise ConfigError(problems)
    sources = [find_source(source) for source in config.sources]
    root = Path(config.store)
    with sole_builder(root), open_engine(config.engine) as mapper:
        return _Build(config, Pipeline(config, sources, root / sealed.STAGES, mapper), root).train_tokenizer()


@contextmanager
def sole_builder(root: Path) -> Iterator[None]:
    """Makes the store's directory and keeps other builds out of it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.store is {root}, which cannot be made: {error.strerror}") from error
    names = sorted(entry.name for entry in root.iterdir())
    if names and not {sealed.STAGES, sealed.MANIFEST, sealed.GROWTH} & set(names):
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


class _Build:
    """One build: the stages in order, then split, tokenizer and store."""

    def __init__(self, config: DataConfig, pipeline: Pipeline, root: Path) -> None:
        self._config = config
        self._pipeline = pipeline
        self._root = root

    def run(self, *, overwrite: bool) -> Store:
        """All stages, or none where the store is finished."""
        pipeline = self._pipeline
        finished = sealed.find(self._root, pipeline.settings, pipeline.sources, overwrite=overwrite)
        if finished is not None:
            for stage, outcome in finished.report["stages"].items():
                pipeline.say(stage, outcome, reused=True)
            return finished.store
        for leftover in self._root.glob(".*.tmp"):
            leftover.unlink()
        documents = pipeline.documents()
        split = self._split(documents)
        tokenizer = self._tokenizer(documents.parts, split)
        return self._store(documents, split, tokenizer)

    def train_tokenizer(self) -> Path:
        """The stages up to the tokenizer; where it lies."""
        documents = self._pipeline.documents()
        return self._tokenizer(documents.parts, self._split(documents)).directory / "tokenizer.json"

    def _split(self, documents: Documents) -> Stage:
        parts, kept, share = documents.parts, documents.kept, self._config.validation.share
        return self._pipeline.run(
            "split",
            [documents.fingerprint],
            lambda directory, meter: split_documents(parts, kept, share, directory, meter, self._pipeline.mapper),
            total=parts.text_bytes,
            needed=parts.rows * 32,
        )

    def _tokenizer(self, parts: Parts, split: Stage) -> Stage:
        """The user's tokenizer, or one trained on a sample."""
        settings, weights = self._config.tokenizer, self._config.weights

        def trained(directory: Path, meter: Meter) -> dict[str, Any]:
            kept = Kept.read(split.directory)
            rows = sample_rows(kept, parts.sources, weights, settings.sample_bytes)
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
        return self._pipeline.run("tokenizer", inputs, work, total=settings.sample_bytes, needed=SMALL_BYTES)

    def _store(self, documents: Documents, split: Stage, tokenizer_stage: Stage) -> Store:
        parts = documents.parts
        kept = Kept.read(split.directory)
        tokenizer = Tokenizer.load(tokenizer_stage.directory / "tokenizer.json")
        inputs = [split.fingerprint, tokenizer_stage.fingerprint]
        configuration = fingerprint_of("store", self._pipeline.settings["store"], inputs)
        if sealed.begun_under(self._root) not in (None, configuration):
            sealed.remove(self._root)
        text_bytes = int(kept.text_bytes.sum())
        require_space(self._root, text_bytes + SMALL_BYTES, "store")
        writer = StoreWriter(self._root, tokenizer=tokenizer, configuration=configuration)
        encoder = Encoder(tokenizer, self._config.tokenizer.encoder)
        with self._pipeline.screen.meter("store", text_bytes) as meter:
            for number, source in enumerate(parts.sources):
                for name, chosen in ((TRAINING, ~kept.validation), (VALIDATION, kept.validation)):
                    rows = kept.row[chosen & (kept.source == number)]
                    seal(writer, parts, rows, encoder, meter, source, name, max_tokens=self._config.shard_tokens)
        self._pipeline.say("store", sealed.store_outcome(writer.shards, parts.sources), reused=False)
        with room_on_disk(self._root / sealed.REPORT, "store"):
            write_clusters(parts, documents.removals, self._root / sealed.CLUSTERS)
            pipeline = self._pipeline
            report = sealed.report_of(pipeline.settings, pipeline.sources, pipeline.report)
            write_json(self._root / sealed.REPORT, report)
        return writer.finish()


def _metered(parts: Parts, rows: NDArray[np.int64], meter: Meter) -> Iterator[str]:
    for batch in texts_of(parts, rows):
        for _, text in batch:
            meter.advance(len(text))
            yield text


def seal(
    writer: StoreWriter, parts: Parts, rows: NDArray[np.int64], encoder: Encoder, meter: Meter,
    source: str, split: str, *, max_tokens: int, before: int = 0, window: bool = False,
) -> None:  # fmt: skip
    """Shards of those rows of a source that have none yet, `before` of its documents having come before them."""
    while True:
        left = rows[max(0, writer.documents_written(source, split) - before) :]
        documents = _encoded(parts, left, encoder, meter)
        try:
            while writer.add_shard(source, split, documents, max_tokens=max_tokens, window=window):
                pass
        except EncodersDiffer:  # The shard was not sealed: its documents come again.
            continue
        return


def _encoded(parts: Parts, rows: NDArray[np.int64], encoder: Encoder, meter: Meter) -> Iterator[TokenizedDocument]:
    """Documents on their way into the store, about a MiB encoded at a time."""
    for batch in texts_of(parts, rows):
        sizes = [len(text.encode()) for _, text in batch]
        portions = np.cumsum(sizes) // _ENCODED_BYTES
        borders = [0, *(np.flatnonzero(np.diff(portions)) + 1).tolist(), len(batch)]
        for start, stop in pairwise(borders):
            found = encoder.encode_batch([text for _, text in batch[start:stop]])
            for (identifier, _), tokens, size in zip(batch[start:stop], found, sizes[start:stop], strict=True):
                yield TokenizedDocument(id=identifier, tokens=tokens, text_bytes=size)
            meter.advance(sum(sizes[start:stop]))
