"""From sources to the documents that are kept: the stages that `data build` and its parts have in common.

    read -> clean -> filters -> decontaminate -> exact -> near

Filters and decontamination stand in the chain only where they are switched on, and before deduplication, so that what
is kept for a duplicate is kept for good. A stage is whole or absent
(data_pipeline.stages), says one line, and stops the job where it drops nearly all of a source.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline import describe, sealed
from data_pipeline.clean import clean_documents
from data_pipeline.config import DataConfig
from data_pipeline.decontaminate import decontaminate_documents, removed_rows
from data_pipeline.dedup.exact import deduplicate_exactly
from data_pipeline.dedup.near import deduplicate_nearly
from data_pipeline.dedup.removed import Removal
from data_pipeline.document import Mapper, Parts, map_in_order
from data_pipeline.filters.stage import filter_documents
from data_pipeline.progress import Meter, Screen
from data_pipeline.read import expected_bytes, read_sources
from data_pipeline.report import refuse_empty, refuse_large_loss
from data_pipeline.sources import SourceFiles
from data_pipeline.stages import Stage, Workspace, fingerprint_of

SMALL_BYTES = 16 << 20
"""Disk space for what does not grow with the corpus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """The cleaned documents, and which of them are still kept."""

    parts: Parts
    kept: NDArray[np.bool_]
    removals: dict[str, Removal]
    """What each deduplicating stage took out."""
    fingerprint: str
    """Of the last stage that had a say."""


class Pipeline:
    """The stages in order, their lines, the report."""

    def __init__(
        self, config: DataConfig, sources: Sequence[SourceFiles], directory: Path, mapper: Mapper = map_in_order
    ) -> None:
        """`directory` takes the stages' files."""
        self.config = config
        self.sources = sources
        self.mapper = mapper
        self.screen = Screen()
        self.settings = sealed.settings_of(config)
        self.report: dict[str, dict[str, Any]] = {}
        self._directory = directory
        self._workspace: Workspace | None = None

    def run(
        self, stage: str, inputs: list[str], work: Callable[[Path, Meter], dict[str, Any]], *, total: int, needed: int
    ) -> Stage:
        """One stage with its meter (`total` bytes of text), its line and its place in the report."""

        def metered(directory: Path) -> dict[str, Any]:
            with self.screen.meter(stage, total) as meter:
                return work(directory, meter)

        if self._workspace is None:
            self._workspace = Workspace(self._directory)
        fingerprint = fingerprint_of(stage, self.settings[stage], inputs)
        done = self._workspace.run(stage, fingerprint, metered, needed_bytes=needed + SMALL_BYTES)
        self.say(stage, done.outcome, reused=done.reused)
        if "counts" in done.outcome:
            refuse_large_loss(stage, done.outcome["counts"], self.config.stages.max_dropped_share)
        return done

    def say(self, stage: str, outcome: dict[str, Any], *, reused: bool) -> None:
        """Puts a stage into the report and on the screen."""
        self.report[stage] = {key: value for key, value in outcome.items() if key != "groups"}
        self.screen.line(stage, describe.line(stage, outcome) + (" (as before)" if reused else ""))

    def documents(self) -> Documents:
        """All stages up to the documents that are kept.

        Raises:
            UserError: a file cannot be read, nothing is left, a source loses too much, the disk is full.
        """
        documents = self._decontaminated(self._filtered(self._read_and_clean()))
        return self._without_near_duplicates(self._without_copies(documents))

    def _read_and_clean(self) -> Documents:
        expected = expected_bytes(self.sources)
        read = self.run(
            "read",
            [sealed.state_of(self.sources)],
            lambda directory, meter: read_sources(self.sources, directory, meter),
            total=expected,
            needed=expected // 2,
        )
        refuse_empty("read", read.outcome["counts"], every_source=True, hint=describe.fields_hint(read.outcome))
        raw = Parts(read.directory, read.outcome["groups"])
        cleaned = self.run(
            "clean",
            [read.outcome["digest"]],
            lambda directory, meter: clean_documents(raw, directory, self.config.stages.clean, meter, self.mapper),
            total=raw.text_bytes,
            needed=raw.text_bytes // 2,
        )
        refuse_empty("clean", cleaned.outcome["counts"], every_source=True)
        return _all_of(cleaned)

    def _filtered(self, documents: Documents) -> Documents:
        settings = self.config.stages.filters
        if not settings.enabled:
            return documents
        parts, sources = documents.parts, {source.name: source for source in self.config.sources}
        done = self.run(
            "filters",
            [documents.fingerprint],
            lambda directory, meter: filter_documents(parts, directory, settings, sources, meter, self.mapper),
            total=parts.text_bytes,
            needed=parts.text_bytes // 2,
        )
        refuse_empty("filters", done.outcome["counts"], every_source=True)
        return _all_of(done)

    def _decontaminated(self, documents: Documents) -> Documents:
        settings = self.config.stages.decontaminate
        if not settings.files:
            return documents
        parts, kept = documents.parts, documents.kept
        done = self.run(
            "decontaminate",
            [documents.fingerprint],
            lambda directory, meter: decontaminate_documents(parts, kept, settings, directory, meter, self.mapper),
            total=parts.text_bytes,
            needed=SMALL_BYTES,
        )
        refuse_empty("decontaminate", done.outcome["counts"], every_source=False)
        left = kept.copy()
        left[removed_rows(done.directory)] = False
        return replace(documents, kept=left, fingerprint=done.fingerprint)

    def _without_copies(self, documents: Documents) -> Documents:
        if not self.config.stages.exact_dedup:
            return documents
        parts, kept = documents.parts, documents.kept
        done = self.run(
            "exact",
            [documents.fingerprint],
            lambda directory, meter: deduplicate_exactly(parts, directory, meter, self.mapper, kept),
            total=parts.text_bytes,
            needed=parts.rows * 24,
        )
        return _after(documents, done, "exact")

    def _without_near_duplicates(self, documents: Documents) -> Documents:
        settings = self.config.stages.near_dedup
        if not settings.enabled:
            return documents
        parts, kept = documents.parts, documents.kept
        done = self.run(
            "near",
            [documents.fingerprint],
            lambda directory, meter: deduplicate_nearly(parts, kept, settings, directory, meter, self.mapper),
            total=parts.text_bytes,
            needed=parts.rows * settings.bands * 8 + parts.text_bytes,
        )
        return _after(documents, done, "near")


def _all_of(done: Stage) -> Documents:
    parts = Parts(done.directory, done.outcome["groups"])
    everything = np.ones(parts.rows, dtype=bool)
    return Documents(parts=parts, kept=everything, removals={}, fingerprint=done.fingerprint)


def _after(documents: Documents, done: Stage, stage: str) -> Documents:
    """The documents that a deduplicating stage left."""
    removal = Removal.read(done.directory)
    kept = documents.kept.copy()
    kept[removal.row] = False
    removals = {**documents.removals, stage: removal}
    return replace(documents, kept=kept, removals=removals, fingerprint=done.fingerprint)
