"""What a person sees while a corpus is built: one line a stage, and a bar where a stage takes long.

The bar appears after two seconds and only on a terminal; elsewhere (a log file, a batch job) a plain line says every
fifteen seconds how far the stage is.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_QUIET_SECONDS = 2.0
_LINE_SECONDS = 15.0


class Meter:
    """How far one stage is, in bytes of text or files."""

    def __init__(self, label: str, total: int, console: Console) -> None:
        self._label = label
        self._total = max(total, 1)
        self._done = 0
        self._console = console
        self._next = time.monotonic() + (_QUIET_SECONDS if console.is_terminal else _LINE_SECONDS)
        self._bar: Progress | None = None

    def advance(self, amount: int) -> None:
        """Adds what was done since the last call."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif time.monotonic() >= self._next:
            self._show()

    def _show(self) -> None:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description:<10}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.add_task(self._label, total=self._total, completed=self._done)
            self._bar.start()
        else:
            self._next = time.monotonic() + _LINE_SECONDS
            share = min(1.0, self._done / self._total)
            self._console.print(f"{self._label:<10} {share:.0%} done", highlight=False)

    def close(self) -> None:
        """Takes the bar off the screen."""
        if self._bar is not None:
            self._bar.stop()


class Screen:
    """Prints the lines and the bars of a build to standard output."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False, markup=False)

    def line(self, stage: str, text: str) -> None:
        """One line of a stage."""
        self._console.print(f"{stage:<10} {text}")
        self._console.file.flush()

    @contextmanager
    def meter(self, stage: str, total: int) -> Iterator[Meter]:
        """A meter for one stage; its bar is gone when the block ends."""
        meter = Meter(stage, total, self._console)
        try:
            yield meter
        finally:
            meter.close()
