"""The curves of one run, or of several beside each other, as plotly figures in plain JSON.

Colours are left to the page, which knows whether the reader's screen is light or dark: a trace names a series number,
and the page's script turns it into a colour. One run is coloured by curve; of several, each run has its colour.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.run_directory import TASK

_PHASES = {
    "time_data_seconds": "data",
    "time_forward_backward_seconds": "forward and backward",
    "time_communication_seconds": "communication",
    "time_optimizer_seconds": "optimizer",
    "time_save_seconds": "saving",
}
_SAVED = "saved"
_QUIET = frozenset(("started", "finished", "samples", TASK))
"""Events that the ends of a curve show already, or that stand elsewhere on the page."""
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """What is drawn of one run."""

    name: str
    records: Records
    """Of its `metrics.jsonl`."""
    events: Records = field(default=())
    """Of its `events.jsonl`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One figure of the page."""

    title: str
    meaning: str
    """What the axes show, with units."""
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


def charts(runs: Sequence[Curves]) -> list[Chart]:
    """The figures; those without any value are left out."""
    found = [
        _loss(runs),
        _line(runs, "tokens_per_second", "Throughput", "tokens per second, all ranks together"),
        _line(runs, "mfu_causal", "Model FLOPs utilisation", "share of the devices' peak, causal count", unit=".0%"),
        _line(runs, "learning_rate", "Learning rate", "of the update of that step"),
        _line(runs, "grad_norm", "Gradient norm", "global, before clipping", log=True),
        _line(runs, "memory_bytes", "Memory", "highest use of any rank so far, bytes", unit=".3s", zero=True),
    ]
    found.append(_tasks(runs))
    if len(runs) == 1:
        found += [_sources(runs[0]), _losses_by_source(runs[0]), _time(runs[0])]
    return [chart for chart in found if chart.traces]


def _loss(runs: Sequence[Curves]) -> Chart:
    traces = []
    for number, run in enumerate(runs):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        traces += _trace(run.records, "loss", f"{prefix}training", series=number)
        style = {"mode": "lines+markers", "dash": "dash" if len(runs) > 1 else "solid"}
        series = number if len(runs) > 1 else 1
        traces += _trace(run.records, "validation_loss", f"{prefix}validation", series=series, **style)
        traces += _events(run, prefix, series=number if len(runs) > 1 else 2)
    return Chart(title="Loss", meaning="nats per token, by step", traces=traces, layout=_layout())


def _events(run: Curves, prefix: str, *, series: int) -> Iterator[dict[str, Any]]:
    """Marks on the curve of the loss: one trace for the saves, one for everything that a reader should look at."""
    records = [record for record in run.records if record.get("loss") is not None]
    seen = [event for event in run.events if event["event"] not in _QUIET]
    kinds = (
        ("saves", "triangle-up", [event for event in seen if event["event"] == _SAVED]),
        ("events", "x", [event for event in seen if event["event"] != _SAVED]),
    )
    for name, symbol, chosen in kinds:
        if chosen and records:
            steps = [record["step"] for record in records]
            places = [max(bisect_right(steps, event["step"]) - 1, 0) for event in chosen]
            yield {
                "x": [event["step"] for event in chosen],
                "y": [records[place]["loss"] for place in places],
                "text": [_said(event) for event in chosen],
                "hovertemplate": "%{text}",
                "name": f"{prefix}{name}",
                "mode": "markers",
                "type": "scatter",
                "marker": {"symbol": symbol, "size": 8},
                "showlegend": not prefix,
                "meta": {"series": series},
            }


def _said(event: dict[str, Any]) -> str:
    facts = [f"{name} {value}" for name, value in event.items() if name not in ("time", "event", "attempt", "step")]
    return ", ".join([f"{event['event']} at step {event['step']}", *facts])


def _line(
    runs: Sequence[Curves], key: str, title: str, meaning: str, *, log: bool = False, unit: str = "", zero: bool = False
) -> Chart:
    traces = []
    for number, run in enumerate(runs):
        traces += _trace(run.records, key, run.name if len(runs) > 1 else title, series=number)
    return Chart(
        title=title, meaning=f"{meaning}, by step", traces=traces, layout=_layout(log=log, unit=unit, zero=zero)
    )


def _sources(run: Curves) -> Chart:
    """Of the tokens since the record before, which share came from which source."""
    records = [record for record in run.records if record.get("tokens_by_source")]
    names = sorted({name for record in records for name in record["tokens_by_source"]})
    traces = []
    before: dict[str, int] = {}
    shares: dict[str, list[float]] = {name: [] for name in names}
    for record in records:
        now = record["tokens_by_source"]
        added = {name: now.get(name, 0) - before.get(name, 0) for name in names}
        total = max(sum(added.values()), 1)
        for name in names:
            shares[name].append(added[name] / total)
        before = now
    for series, name in enumerate(names):
        steps = [record["step"] for record in records]
        trace = {"x": steps, "y": shares[name], "name": name, "mode": "lines", "type": "scatter", "stackgroup": "all"}
        traces.append({**trace, "meta": {"series": series}})
    meaning = "share of each source in the tokens since the record before, by step"
    return Chart(title="Mixture", meaning=meaning, traces=traces, layout=_layout(unit=".0%"))


def _losses_by_source(run: Curves) -> Chart:
    names = sorted({name for record in run.records for name in record.get("loss_by_source") or ()})
    traces = []
    for series, name in enumerate(names):
        found = [
            {"step": record["step"], name: (record.get("loss_by_source") or {}).get(name)} for record in run.records
        ]
        traces += _trace(found, name, name, series=series)
    return Chart(title="Loss by source", meaning="nats per token, by step", traces=traces, layout=_layout())


def _tasks(runs: Sequence[Curves]) -> Chart:
    """Figures of tasks that are shares, such as accuracies: others have scales of their own, and stand in the table."""
    traces = []
    for number, run in enumerate(runs):
        rows = [{"step": record["step"], **record["tasks"]} for record in run.records if record.get("tasks")]
        values = {name: [row[name] for row in rows if row.get(name) is not None] for row in rows for name in row}
        shares = [name for name, found in values.items() if name != "step" and all(0 <= each <= 1 for each in found)]
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        for place, name in enumerate(name for name in shares if "stderr" not in name):
            series = number if len(runs) > 1 else place
            traces += _trace(rows, name, f"{prefix}{name}", series=series, mode="lines+markers")
    return Chart(title="Tasks", meaning="figures from 0 to 1, by step", traces=traces, layout=_layout())


def _time(run: Curves) -> Chart:
    traces = []
    for series, (key, name) in enumerate(_PHASES.items()):
        for trace in _trace(run.records, key, name, series=series):
            traces.append({**trace, "type": "bar"})
    layout = {**_layout(), "barmode": "stack"}
    return Chart(title="Time", meaning="seconds since the record before, by phase", traces=traces, layout=layout)


def _trace(
    records: Records, key: str, name: str, *, series: int = 0, mode: str = "lines", dash: str = "solid"
) -> list[dict[str, Any]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    trace = {"x": steps, "y": values, "name": name, "mode": mode, "type": "scatter"}
    return [{**trace, "line": {"dash": dash}, "meta": {"series": series}}]


def _layout(*, log: bool = False, unit: str = "", zero: bool = False) -> dict[str, Any]:
    return {
        "height": 300,
        "margin": {"l": 56, "r": 12, "t": 8, "b": 40},
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"type": "log" if log else "linear", "tickformat": unit, "rangemode": "tozero" if zero else "normal"},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    }
