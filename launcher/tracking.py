"""Where metrics, events and samples go: `metrics.jsonl` always, then whatever sinks were chosen at assembly.

`metrics.jsonl` and `events.jsonl` are the truth; everything else is a copy. A sink's failure never takes the run down.
Events (a spike, a hang, a requeue) are written by whoever sees them, this process or another; the tracker reads the
file as it grows and tells its sinks, at each logged step and at the end.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from launcher.display import Display
from launcher.progress import Progress
from parallel.common.lines import JsonLines


class Sink(Protocol):
    """Something that is told what a run reports; none of its methods raises."""

    def log(self, progress: Progress, record: Mapping[str, Any]) -> None:
        """A step was logged; the record's names stand in `launcher.metrics`."""
        ...

    def event(self, event: Mapping[str, Any], place: int) -> None:
        """Something happened: a line of `events.jsonl`, which ends at byte `place`."""
        ...

    def close(self, exit_code: int) -> None:
        """The attempt is over."""
        ...


class Shown:
    """The display as a sink."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def log(self, progress: Progress, record: Mapping[str, Any]) -> None:
        """Shows it."""
        self._display.log(record, remaining_tokens=progress.remaining_tokens)

    def event(self, event: Mapping[str, Any], place: int) -> None:
        """Whoever records an event says it where a person should know."""

    def close(self, exit_code: int) -> None:
        """Nothing is left."""


class Tracker:
    """Hands records and events on; on ranks other than 0 it has nowhere to."""

    def __init__(self, *, metrics: JsonLines | None, events: Path | None, sinks: Sequence[Sink] = ()) -> None:
        self._metrics = metrics
        self._events = None if events is None else Events(events)
        self._sinks = sinks

    def log(self, progress: Progress, record: Mapping[str, Any]) -> None:
        """Records one step, and tells what happened since the last."""
        if self._metrics is not None:
            self._metrics.append(dict(record))
        for sink in self._sinks:
            sink.log(progress, record)
        self._tell()

    @contextmanager
    def told(self) -> Iterator[None]:
        """An error in the block ends the attempt here too: what led to it is told first."""
        try:
            yield
        except BaseException:
            self.close(1)
            raise

    def close(self, exit_code: int) -> None:
        """The attempt is over."""
        self._tell()
        for sink in self._sinks:
            sink.close(exit_code)

    def _tell(self) -> None:
        if self._events is None:
            return
        for event, place in self._events.new():
            for sink in self._sinks:
                sink.event(event, place)


class Events:
    """A growing file of one JSON object a line, read as far as it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = 0

    def new(self) -> Iterator[tuple[dict[str, Any], int]]:
        """What was appended since the last call, each with the place where its line ends."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._place)
                lines = file.readlines()
        except FileNotFoundError:
            return
        for line in lines:
            if not line.endswith(b"\n"):
                return  # its writer is not done
            self._place += len(line)
            yield json.loads(line), self._place
