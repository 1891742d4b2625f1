"""The curves of a run as plotly figures, in plain JSON.

Colours are left to the page, which knows whether the reader's screen is light or dark: a trace names a series number,
and the page's script turns it into a colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PHASES = {
    "time_data_seconds": "data",
    "time_forward_backward_seconds": "forward and backward",
    "time_communication_seconds": "communication",
    "time_optimizer_seconds": "optimizer",
    "time_save_seconds": "saving",
}
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One figure of the page."""

    title: str
    meaning: str
    """What the axes show, with units."""
    traces: list[dict[str, Any]]
    layout: dict[str, Any]


def charts(records: Records) -> list[Chart]:
    """The figures for the records of `metrics.jsonl`; those without any value are left out."""
    found = [
        _loss(records),
        _line(records, "tokens_per_second", "Throughput", "tokens per second, all ranks together"),
        _line(records, "mfu_causal", "Model FLOPs utilisation", "share of the devices' peak, causal count", unit=".0%"),
        _line(records, "learning_rate", "Learning rate", "of the update of that step"),
        _line(records, "grad_norm", "Gradient norm", "global, before clipping", log=True),
        _line(records, "memory_bytes", "Memory", "highest use of any rank so far, bytes", unit=".3s"),
        _time(records),
    ]
    return [chart for chart in found if chart.traces]


def _loss(records: Records) -> Chart:
    traces = []
    for series, (key, name, mode) in enumerate(
        (("loss", "training", "lines"), ("validation_loss", "validation", "lines+markers"))
    ):
        traces += _trace(records, key, name, series=series, mode=mode)
    return Chart(title="Loss", meaning="nats per token, by step", traces=traces, layout=_layout())


def _line(records: Records, key: str, title: str, meaning: str, *, log: bool = False, unit: str = "") -> Chart:
    layout = _layout(log=log, unit=unit)
    return Chart(title=title, meaning=f"{meaning}, by step", traces=_trace(records, key, title), layout=layout)


def _time(records: Records) -> Chart:
    traces = []
    for series, (key, name) in enumerate(_PHASES.items()):
        for trace in _trace(records, key, name, series=series):
            traces.append({**trace, "type": "bar"})
    layout = {**_layout(), "barmode": "stack"}
    return Chart(title="Time", meaning="seconds since the record before, by phase", traces=traces, layout=layout)


def _trace(records: Records, key: str, name: str, *, series: int = 0, mode: str = "lines") -> list[dict[str, Any]]:
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    return [{"x": steps, "y": values, "name": name, "mode": mode, "type": "scatter", "meta": {"series": series}}]


def _layout(*, log: bool = False, unit: str = "") -> dict[str, Any]:
    return {
        "height": 300,
        "margin": {"l": 56, "r": 12, "t": 8, "b": 40},
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"type": "log" if log else "linear", "tickformat": unit},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.12},
    }
