"""What a person sees of an explanation: the layout in words, the table, the user's own row in full."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from launcher.explain.collectives import Collective
from launcher.explain.explanation import Explanation, Measured
from launcher.explain.rows import WIDTHS, Row
from parallel.common.units import format_bytes, format_count
from parallel.config import Precision
from parallel.mechanism import Reduction
from parallel.memory import HOST, KINDS

_WHEN = {
    Reduction.at_the_end: "at the end",
    Reduction.in_last_backward: "last backward",
    Reduction.in_every_backward: "every backward",
}
_SHARDED = ("nothing", "masters, moments", "+ gradients", "+ weights")


def show(found: Explanation) -> None:
    """Prints everything."""
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(found):
        console.print(line if isinstance(line, Text) else Text(line))


def _lines(found: Explanation) -> list[str | Text]:
    lines: list[str | Text] = [*_layout(found), "", *_table(found), "", *_own(found)]
    if found.collectives is not None:
        lines += ["", *_collectives(found.collectives)]
    return lines


def _layout(found: Explanation) -> list[str]:
    return [
        f"{found.layout}; {found.precision.value}",
        f"{format_count(found.parameters)} parameters; the fullest rank holds {format_count(found.rank_parameters)}"
        + (" of them" if found.rank_parameters < found.parameters else ""),
    ]


def _table(found: Explanation) -> list[str | Text]:
    place = " (device + host)" if found.rows[0].layout.offload else ""
    small = "small copy: computed / measured" if found.measured else ""
    lines: list[str | Text] = [
        f"bytes that a rank holds between two micro-batches{place}: {', '.join(KINDS)}; no activations",
        f"  {'':<21}{'ZeRO':<6}{'runs':<18}{'sharded':<18}{'gradients reduced':<19}"
        f"{'fp32':<21}{'bf16, fp16':<21}{small}".rstrip(),
    ]
    for number, row in enumerate(found.rows):
        name = row.pipeline if row.layout.zero_stage == 0 else ""
        start = f"{'>' if row.yours else ' '} {name:<21}{row.layout.zero_stage:<6}"
        cells = _cells(row, found.precision, found.measured.get(number, ()))
        lines.append(Text(start + cells, style="bold" if row.yours else ""))
    return lines


def _cells(row: Row, precision: Precision, measured: Sequence[Measured]) -> str:
    how = row.mechanism
    if how is None:
        return f"refused: {row.refused}"
    runs = f"DeepSpeed ZeRO-{how.stage}" if how.stage else "torch's AdamW"
    if how.whole_parameters:
        runs = "whole parameters"
    fp32, low = (_place(row.bytes[precision]) for precision in (Precision.fp32, Precision.bf16))
    one = next((one for one in measured if WIDTHS[one.precision] == WIDTHS[precision]), None)
    small = "" if one is None else f"{one.computed_bytes:,} / {one.measured_bytes:,}"
    cells = f"{runs:<18}{_SHARDED[how.stage]:<18}{_WHEN[how.reduction]:<19}{fp32:<21}{low:<21}{small}"
    return cells.rstrip()


def _place(held: Mapping[str, int]) -> str:
    device = sum(count for kind, count in held.items() if not kind.startswith(HOST))
    host = sum(count for kind, count in held.items() if kind.startswith(HOST))
    return f"{format_bytes(device)} + {format_bytes(host)}" if host else format_bytes(device)


def _own(found: Explanation) -> list[str | Text]:
    own, measured = found.own, found.own_measured
    assert own.mechanism is not None
    lines: list[str | Text] = [
        f"your row: {own.mechanism.runs}, gradients are reduced {own.mechanism.reduction.value}:",
        f"  {own.mechanism.reason}",
        "",
    ]
    held = own.bytes[found.precision]
    heads = ["your model"]
    if any(kind.startswith(HOST) for kind in held):
        heads = ["your model, device", "your model, host"]
    if measured is not None:
        heads += ["small copy, computed", "small copy, measured"]
    lines.append(f"  {'':<12}" + "".join(f"{head:>22}" for head in heads))
    for kind in (*KINDS, "together"):
        columns = [_sum(held, kind, "")] if len(heads) % 2 else [_sum(held, kind, ""), _sum(held, kind, HOST)]
        cells = [format_bytes(count) for count in columns]
        if measured is not None:
            cells += [f"{_sum(side, kind, ''):,}" for side in (measured.computed, measured.measured)]
        lines.append(f"  {kind:<12}" + "".join(f"{cell:>22}" for cell in cells))
    if measured is not None:
        verdict = "equal" if measured.computed == measured.measured else "NOT EQUAL: please report this"
        lines.append(Text(f"  computed and measured are {verdict} ({found.small})"))
    return lines


def _sum(held: Mapping[str, int], kind: str, place: str) -> int:
    kinds = KINDS if kind == "together" else (kind,)
    return sum(held.get(f"{place}{one}", 0) for one in kinds)


def _collectives(found: Sequence[Collective]) -> list[str | Text]:
    lines: list[str | Text] = ["collectives of a step of the small copy, on its first rank, as counted:"]
    for when, calls in groupby(found, key=lambda call: call.when):
        lines.append(f"  {when.value}")
        for call in calls:
            over = f"{call.over} ({call.ranks} ranks)"
            lines.append(f"    {call.name:<16}{over:<28}{call.calls:>5} x  {format_bytes(call.bytes):>9} together")
    return lines if found else ["the small copy's ranks send each other nothing but single numbers"]
