"""The stage that filters: language, length, quality and repetition rules, and personal data masked in what is kept.

Each document is looked at once; it is dropped under the first rule that it fails, so that counts add up. Counts per
source and rule, samples of each, languages per source and masked numbers stand in the report.

The rules are Python: 1 to 3 MB a second and core, held by the interpreter's lock (`data.engine=ray` gives each core
its own interpreter). All are off by default.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.clean import replaced_texts
from data_pipeline.config import SourceConfig
from data_pipeline.document import SCHEMA, Group, Mapper, Parts, PartWriter, map_in_order, text_buffer
from data_pipeline.filters.config import FiltersConfig
from data_pipeline.filters.language import identify
from data_pipeline.filters.pii import mask
from data_pipeline.filters.rules import c4_lines, rules
from data_pipeline.filters.view import View
from data_pipeline.progress import Meter
from data_pipeline.report import Tally


@dataclass(slots=True)
class Filtered:
    """What the filters made of a batch."""

    batch: pa.RecordBatch
    changed: int = 0
    """Documents in which something was masked or taken out."""
    dropped: list[tuple[str, str, int, str]] = field(default_factory=list)
    """(reason, id, bytes, text) of each document that is not in the batch."""
    languages: Counter[str] = field(default_factory=Counter)
    """Documents that came in, by language, where it was looked for."""
    masked: Counter[str] = field(default_factory=Counter)
    """Places that were masked, by kind."""


def filter_batch(batch: pa.RecordBatch, settings: FiltersConfig, language: str | None) -> Filtered:
    """Filters a batch of (id, text) of a source that is written in `language` (None: not known)."""
    result = Filtered(batch=batch)
    wanted = rules(settings)
    changed: dict[int, bytes] = {}
    kept: list[bool] = []
    ids = batch.column("id")
    for row, text in enumerate(batch.column("text").to_pylist()):
        view = View(text, language)
        reason = _wrong_language(view, settings, result.languages)
        if reason is None and settings.c4.enabled:
            view = View(c4_lines(view, settings.c4), view.known_language)
            reason = None if view.lines else "c4: no line is left"
        reason = reason or next((why for rule in wanted if (why := rule(view)) is not None), None)
        kept.append(reason is None)
        if reason is not None:
            result.dropped.append((reason, ids[row].as_py(), len(text.encode()), text))
            continue
        masked, counts = mask(view.text, settings.mask)
        result.masked.update(counts)
        if masked != text:
            changed[row] = masked.encode()
    if changed:
        data, borders = text_buffer(batch.column("text"))
        texts = replaced_texts(data, borders, changed)
        result.batch = pa.record_batch([batch.column("id"), texts], schema=SCHEMA)
        result.changed = len(changed)
    if not all(kept):
        result.batch = result.batch.filter(pa.array(kept))
    return result


def _wrong_language(view: View, settings: FiltersConfig, languages: Counter[str]) -> str | None:
    """Why the language is not wanted; what is found stands in the view from then on."""
    asked = settings.language
    expected = (view.known_language,) if view.known_language is not None else asked.keep
    if view.is_code or not (asked.identify or asked.keep):
        return None
    found, certainty = identify(view)
    languages[found] += 1
    if asked.keep and found not in expected:
        return f"language: {found}"
    if asked.keep and certainty < asked.min_confidence:
        return "language: not certain"
    view.known_language = found
    return None


def filter_documents(
    parts: Parts,
    directory: Path,
    settings: FiltersConfig,
    sources: Mapping[str, SourceConfig],
    meter: Meter,
    mapper: Mapper = map_in_order,
) -> dict[str, Any]:
    """Filters all batches; returns counts and groups."""
    tally = Tally(parts.sources)
    writer = PartWriter(directory)
    changed = dict.fromkeys(parts.sources, 0)
    languages: dict[str, Counter[str]] = {source: Counter() for source in parts.sources}
    masked: dict[str, Counter[str]] = {source: Counter() for source in parts.sources}
    known = {name: source.language for name, source in sources.items()}
    work = partial(_filter_group, parts, settings, known)
    for group, found in zip(parts.groups, mapper(work, parts.groups), strict=True):
        for reason, identifier, size, text in found.dropped:
            tally.drop(group.source, reason, identifier, size, text)
        borders = text_buffer(found.batch.column("text"))[1]
        tally.keep(group.source, found.batch.num_rows, int(borders[-1] - borders[0]))
        changed[group.source] += found.changed
        languages[group.source] += found.languages
        masked[group.source] += found.masked
        writer.write(group.source, found.batch)
        meter.advance(group.text_bytes)
    return {
        "counts": tally.to_json(),
        "changed": changed,
        "languages": {name: dict(counts.most_common()) for name, counts in languages.items() if counts},
        "masked": {name: dict(sorted(counts.items())) for name, counts in masked.items() if counts},
        "groups": writer.close(),
    }


def _filter_group(parts: Parts, settings: FiltersConfig, known: Mapping[str, str | None], group: Group) -> Filtered:
    return filter_batch(parts.read(group), settings, known[group.source])
