"""What a person sees of a training run: a bar on a terminal, plain lines in a file. Rank 0 only.

The bar moves with every step; loss and rate are those of the last logged step, because reading them costs a wait.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

from parallel.common.units import format_bytes, format_count, format_duration

_TEXT_COLUMNS = 76
"""What the numbers beside the bar may take; a narrow terminal has a short bar."""


class Display:
    """Says nothing; what every rank but the first has."""

    @contextmanager
    def shown(self, *, step: int, total_steps: int) -> Iterator[None]:
        """The display stands as long as the block runs."""
        yield

    def advance(self) -> None:
        """One step was taken."""

    def log(self, record: Mapping[str, Any], *, remaining_tokens: int) -> None:
        """A record of metrics was made."""


class PlainDisplay(Display):
    """A line a record, for a log file or a pipe."""

    @contextmanager
    def shown(self, *, step: int, total_steps: int) -> Iterator[None]:
        self._total = total_steps
        yield

    def log(self, record: Mapping[str, Any], *, remaining_tokens: int) -> None:
        print(f"step {record['step']}/{self._total}  {_said(record, remaining_tokens)}", flush=True)


class BarDisplay(Display):
    """A progress bar."""

    def __init__(self, console: Console) -> None:
        columns = (
            BarColumn(bar_width=max(8, min(24, console.width - _TEXT_COLUMNS))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        )
        self._bar = Progress(*columns, console=console)
        self._task = TaskID(0)

    @contextmanager
    def shown(self, *, step: int, total_steps: int) -> Iterator[None]:
        self._task = self._bar.add_task("training", total=total_steps, completed=step, said="the first step")
        with self._bar:
            yield

    def advance(self) -> None:
        self._bar.advance(self._task)

    def log(self, record: Mapping[str, Any], *, remaining_tokens: int) -> None:
        self._bar.update(self._task, said=_said(record, remaining_tokens))


def make_display(rank: int) -> Display:
    """The display for this rank and this output."""
    if rank != 0:
        return Display()
    return BarDisplay(Console()) if sys.stdout.isatty() else PlainDisplay()


def _said(record: Mapping[str, Any], remaining_tokens: int) -> str:
    rate = record["tokens_per_second"]
    parts = ["loss not finite" if record["loss"] is None else f"loss {record['loss']:.3f}"]
    if "validation_loss" in record:
        parts.append(f"validation {record['validation_loss']:.3f}")
    parts.append(f"{format_count(rate)} tokens/s")
    if record["mfu_causal"] is not None:
        parts.append(f"MFU {record['mfu_causal']:.1%}")
    parts.append(format_bytes(record["memory_bytes"]))
    parts.append(f"{format_duration(remaining_tokens / rate)} left")
    return "  ".join(parts)
