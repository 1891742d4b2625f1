"""`report.html`: everything about a run in one file that needs no network.

The plotting script stands in the file itself (4.8 MB of the page's 5), nothing is loaded from anywhere, and every text
that comes from the corpus or the model is escaped. Light and dark follow the reader's screen. Imports without torch.
"""

import html
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from launcher import config as configuration
from launcher.evaluation import result
from launcher.outcome import Outcome
from launcher.report.charts import Curves, charts
from launcher.report.markup import asset, corpus, document, read_json, section, table
from launcher.run_directory import RunDirectory
from parallel.common.units import format_bytes, format_count

_SAMPLES_SHOWN, _CHECKPOINTS_SHOWN = 20, 5


def page(run: RunDirectory) -> str:
    """The whole page of one run."""
    config = configuration.load([run.config])
    records = list(run.metrics)
    report = read_json(Path(config.data.store) / "report.json")
    missing = f"<p>{html.escape(config.data.store)} has no report.json.</p>"
    body = [
        _summary(run, records),
        section("Curves", _curves([_drawn(run, records)])),
        section("Evaluation", _evaluation(run)),
        section("Samples", _samples(list(run.samples))),
        section("Corpus", missing if report is None else corpus(report)),
        section("Attempts", _attempts(list(run.history))),
        section("Configuration", f"<pre>{html.escape(run.config.read_text())}</pre>"),
    ]
    return document(config.run.name, body, head_script=get_plotlyjs(), end_script=asset("page.js"))


def comparison(runs: Sequence[RunDirectory]) -> str:
    """The page of several runs beside each other: figures, curves, and what differs in their configurations."""
    drawn = [_drawn(run, list(run.metrics)) for run in runs]
    if len({run.name for run in drawn}) < len(drawn):
        drawn = [replace(curves, name=str(run.path)) for curves, run in zip(drawn, runs, strict=True)]
    body = [
        section("Runs", _last_figures(drawn)),
        section("Curves", _curves(drawn)),
        section("Evaluation", _evaluations(runs, drawn)),
        section("Configuration", _differences(runs, drawn)),
    ]
    return document("Runs compared", body, head_script=get_plotlyjs(), end_script=asset("page.js"))


def _drawn(run: RunDirectory, records: Sequence[dict[str, Any]]) -> Curves:
    return Curves(name=run.path.name, records=records, events=list(run.events))


def _last_figures(drawn: Sequence[Curves]) -> str:
    rows = []
    for run in drawn:
        last = run.records[-1] if run.records else {}
        validation = [record["validation_loss"] for record in run.records if "validation_loss" in record]
        shown = (
            ("step", "{:,}"), ("loss", "{:.4f}"), ("tokens_per_second", "{:,.0f}"), ("mfu_causal", "{:.1%}"),
        )  # fmt: skip
        figures = [form.format(last[key]) if last.get(key) is not None else "" for key, form in shown]
        tokens = format_count(last["tokens"]) if last else ""
        rows.append((run.name, *figures[:2], f"{validation[-1]:.4f}" if validation else "", tokens, *figures[2:]))
    heads = ("run", "steps", "training loss", "validation loss", "tokens", "tokens per second", "MFU (causal)")
    return table(heads, rows)


def _evaluations(runs: Sequence[RunDirectory], drawn: Sequence[Curves]) -> str:
    parts = []
    for run, curves in zip(runs, drawn, strict=True):
        parts.append(f"<h3>{html.escape(curves.name)}</h3>\n{_evaluation(run)}")
    return "\n".join(parts)


def _differences(runs: Sequence[RunDirectory], drawn: Sequence[Curves]) -> str:
    """The keys in which not all runs agree, a column a run."""
    trees = [configuration.flatten(configuration.to_dict(configuration.load([run.config]))) for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = [
        (key, *("" if tree.get(key) is None else str(tree[key]) for tree in trees))
        for key in keys
        if any(tree.get(key) != trees[0].get(key) for tree in trees)
    ]
    if not rows:
        return "<p>They are the same.</p>"
    return table(("key", *(run.name for run in drawn)), rows, text_columns=range(len(runs) + 1))


def _summary(run: RunDirectory, records: Sequence[Mapping[str, Any]]) -> str:
    outcome = Outcome.read(run.outcome)
    state = outcome.message if outcome else "no attempt has ended yet"
    figures = []
    if records:
        last = records[-1]
        figures = [
            ("steps", f"{last['step']:,}"),
            ("tokens seen", format_count(last["tokens"])),
            ("training loss", "not finite" if last["loss"] is None else f"{last['loss']:.3f}"),
            ("tokens per second", format_count(last["tokens_per_second"])),
            ("memory of a rank", format_bytes(last["memory_bytes"])),
        ]
    tiles = "".join(f"<div><b>{html.escape(value)}</b><span>{name}</span></div>" for name, value in figures)
    return f'<p>{html.escape(state)}</p>\n<div class="figures">{tiles}</div>'


def _curves(runs: Sequence[Curves]) -> str:
    found = charts(runs)
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


def _evaluation(run: RunDirectory) -> str:
    """On the validation documents, and of tasks."""
    found, asked = read_json(run.path / result.NAME), _tasks(list(run.tasks))
    if found is None:
        return asked or "<p>Not evaluated yet: <code>bloomery evaluate</code> does it.</p>"
    note = (
        f"{result.measure(found)} on documents that training never saw, {found['checkpoint']}. {result.legend(found)}"
    )
    return f"<p>{html.escape(note)}</p>\n{table(*result.table(found))}\n{asked}"


def _tasks(lines: Sequence[Mapping[str, Any]]) -> str:
    """A column a checkpoint, the newest ones, with the latest figures of each task."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in lines:
        for figure, value in line.items():
            if isinstance(value, float):
                found.setdefault((line["task"], figure), {})[line["step"]] = value
    if not found:
        return ""
    steps = sorted({step for values in found.values() for step in values})[-_CHECKPOINTS_SHOWN:]
    rows = [
        (*names, *(f"{values[step]:.4f}" if step in values else "" for step in steps))
        for names, values in found.items()
        if not values.keys().isdisjoint(steps)
    ]
    return table(("task", "figure", *(f"step {step:,}" for step in steps)), rows, text_columns=(0, 1))


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


def _attempts(history: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(attempt["time"])),
            str(attempt["from_step"]),
            ", ".join(f"{name} {value}" for name, value in attempt["layout"].items()),
            ", ".join(f"{name} {value}" for name, value in attempt["versions"].items()),
            ", ".join(f"{key}: {old} to {new}" for key, (old, new) in attempt["changes"].items()) or "none",
        )
        for attempt in history
    ]
    heads = ("began", "after step", "layout", "versions", "changes")
    return table(heads, rows, text_columns=(0, 2, 3, 4))
