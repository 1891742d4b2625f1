"""`report.html`: everything about a run in one file that needs no network.

The plotting script stands in the file itself (4.8 MB of the page's 5), nothing is loaded from anywhere, and every text
that comes from the corpus or the model is escaped. Light and dark follow the reader's screen. Imports without torch.
"""

import html
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from data_pipeline.describe import line
from launcher import config as configuration
from launcher.evaluation import result
from launcher.outcome import Outcome
from launcher.report.charts import charts
from launcher.run_directory import RunDirectory
from parallel.common.units import format_bytes, format_count

_SAMPLES_SHOWN = 20


def page(run: RunDirectory) -> str:
    """The whole page."""
    config = configuration.load([run.config])
    records = list(run.metrics)
    sections = [
        ("Curves", _curves(records)),
        ("Evaluation", _evaluation(_read(run.path / result.NAME))),
        ("Samples", _samples(list(run.samples))),
        ("Corpus", _corpus(_read(Path(config.data.store) / "report.json"), config.data.store)),
        ("Attempts", _attempts(list(run.history))),
        ("Configuration", f"<pre>{html.escape(run.config.read_text())}</pre>"),
    ]
    title = html.escape(config.run.name)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}: Bloomery</title>\n<style>\n{_asset('page.css')}</style>",
            f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<main>",
            f"<h1>{title}</h1>\n{_summary(run, records)}",
            *(f"<section>\n<h2>{name}</h2>\n{body}\n</section>" for name, body in sections),
            f"</main>\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _summary(run: RunDirectory, records: Sequence[Mapping[str, Any]]) -> str:
    outcome = Outcome.read(run.outcome)
    state = outcome.message if outcome else "no attempt has ended yet"
    figures = []
    if records:
        last = records[-1]
        figures = [
            ("steps", f"{last['step']:,}"),
            ("tokens seen", format_count(last["tokens"])),
            ("training loss", f"{last['loss']:.3f}"),
            ("tokens per second", format_count(last["tokens_per_second"])),
            ("memory of a rank", format_bytes(last["memory_bytes"])),
        ]
    tiles = "".join(f"<div><b>{html.escape(value)}</b><span>{name}</span></div>" for name, value in figures)
    return f'<p>{html.escape(state)}</p>\n<div class="figures">{tiles}</div>'


def _curves(records: Sequence[dict[str, Any]]) -> str:
    found = charts(records)
    if not found:
        return "<p>No step was logged yet.</p>"
    parts = []
    for chart in found:
        data = json.dumps({"data": chart.traces, "layout": chart.layout}).replace("</", "<\\/")
        parts.append(
            f"<figure><figcaption><b>{chart.title}</b> {chart.meaning}</figcaption>"
            f'<div class="chart"></div><script type="application/json">{data}</script></figure>'
        )
    return f'<div class="charts">{"".join(parts)}</div>'


def _evaluation(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "<p>Not evaluated yet: <code>bloomery evaluate</code> does it.</p>"
    note = f"Bits per byte on documents that training never saw, {found['checkpoint']}. {result.LEGEND}"
    return f"<p>{html.escape(note)}</p>\n{_table(*result.table(found))}"


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return "<p>None yet: <code>bloomery generate</code> makes them.</p>"
    parts = []
    for sample in samples[-_SAMPLES_SHOWN:]:
        drawn = "likeliest tokens" if sample["temperature"] == 0 else f"temperature {sample['temperature']}"
        prompt, continuation = html.escape(sample["prompt"]), html.escape(sample["continuation"])
        about = html.escape(f"{sample['checkpoint']}, {drawn}")
        parts.append(f"<figure><figcaption>{about}</figcaption><pre><b>{prompt}</b>{continuation}</pre></figure>")
    return "\n".join(parts)


def _corpus(report: Mapping[str, Any] | None, store: str) -> str:
    if report is None:
        return f"<p>{html.escape(store)} has no report.json.</p>"
    stages = "".join(
        f"<dt>{html.escape(stage)}</dt><dd>{html.escape(line(stage, outcome))}</dd>"
        for stage, outcome in report["stages"].items()
    )
    rows = []
    for stage, outcome in report["stages"].items():
        for source, counts in outcome.get("counts", {}).get("sources", {}).items():
            kept = counts["kept"]
            reasons = "; ".join(f"{lost['documents']:,} {reason}" for reason, lost in counts["dropped"].items())
            rows.append(
                (stage, source, f"{kept['documents']:,}", format_bytes(kept["text_bytes"]), reasons or "nothing")
            )
    table = _table(("stage", "source", "kept", "text", "dropped"), rows, text_columns=(0, 1, 4))
    return f"<dl>{stages}</dl>\n{table}"


def _attempts(history: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt["time"])),
            str(attempt["from_step"]),
            ", ".join(f"{name} {value}" for name, value in attempt["layout"].items()),
            ", ".join(f"{name} {value}" for name, value in attempt["versions"].items()),
            ", ".join(f"{key}: {old} to {new}" for key, (old, new) in attempt["config_changes"].items()) or "none",
        )
        for attempt in history
    ]
    heads = ("began", "after step", "layout", "versions", "changes of the configuration")
    return _table(heads, rows, text_columns=(0, 2, 3, 4))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Sequence[int] = (0,)) -> str:
    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if index in text_columns else ' class="number"'}>{html.escape(value)}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{cells(heads, "th")}</tr>\n{body}\n</table></div>'


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _asset(name: str) -> str:
    return files("launcher.report").joinpath(name).read_text()
