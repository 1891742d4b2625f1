"""`STORE/report.html`: what came in, what each stage dropped with samples, duplicates by source, lengths, languages.

No times, host names or paths: the same store gives the same bytes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_pipeline.inspect import BUCKETS, statistics
from data_pipeline.manifest import FILE_NAME
from data_pipeline.store import Store
from launcher.report.markup import corpus, document, dropped_samples, read_json, section, table
from parallel.common.errors import UserError
from parallel.common.files import write_text
from parallel.common.units import format_bytes


def write_store_page(store: Path) -> Path:
    """Writes the page beside the store's report.json.

    Raises:
        UserError: there is no report.json.
    """
    built, grown = read_json(store / "report.json"), read_json(store / "growth" / "report.json")
    if built is None and grown is None:
        raise UserError(f"{store} has no report.json: `bloomery data build` makes it.")
    page = store / "report.html"
    body = [section(name, corpus(report)) for name, report in (("Corpus", built), ("Growth", grown)) if report]
    body += _counts(store)
    body += _languages(built) if built else []
    samples = [dropped_samples(report) for report in (built, grown) if report]
    body.append(section("Samples of what was dropped", "\n".join(samples)))
    write_text(page, document("Token store", body))
    return page


def _counts(store: Path) -> Iterable[str]:
    """What the shards hold, where the store itself lies beside its report."""
    if (store / FILE_NAME).is_file():
        yield section("Tokens", _tokens(statistics(Store.open(store))))
        clusters = [place / "clusters.parquet" for place in (store, store / "growth")]
        yield section("Duplicates by source", _duplicates(clusters))


def _tokens(found: Mapping[str, Any]) -> str:
    """Counts and lengths by source."""
    counts = [
        (
            source, split, f"{facts['documents']:,}", f"{facts['tokens']:,}", format_bytes(facts["text_bytes"]),
            f"{facts['text_bytes'] / facts['tokens']:.2f}", f"{facts['median']:,.0f}", f"{facts['longest']:,}",
        )
        for source, splits in found["sources"].items()
        for split, facts in splits.items()
    ]  # fmt: skip
    heads = ("source", "split", "documents", "tokens", "text", "bytes a token", "median length", "longest")
    lengths = [
        (source, *(f"{sum(counted):,}" for counted in zip(*(f["histogram"] for f in splits.values()), strict=True)))
        for source, splits in found["sources"].items()
    ]
    borders = ("documents of up to ... tokens", *(f"{border:,}" for border in BUCKETS), "more")
    return table(heads, counts, text_columns=(0, 1)) + table(borders, lengths)


def _duplicates(clusters: Iterable[Path]) -> str:
    """How many documents of which source went, and in which one their twin is kept."""
    rows = [row for file in clusters if file.is_file() for row in pq.read_table(file).to_pylist()]
    counts = Counter((row["removed_source"], row["kept_source"], row["stage"]) for row in rows)
    if not counts:
        return "<p>None.</p>"
    shown = [(*names, f"{count:,}") for names, count in sorted(counts.items())]
    return table(("removed from", "kept in", "stage", "documents"), shown, text_columns=(0, 1, 2))


def _languages(report: Mapping[str, Any]) -> Iterable[str]:
    """Documents that came into the filters, by language, where it was looked for."""
    found = report["stages"].get("filters", {}).get("languages", {})
    rows = [(source, code, f"{count:,}") for source, counts in found.items() for code, count in counts.items()]
    if rows:
        yield section("Languages", table(("source", "language", "documents"), rows, text_columns=(0, 1)))
