"""TensorBoard: the same curves as event files in `tensorboard/` of the run.

An extra: `pip install bloomery[tensorboard]`.

Figures that `bloomery evaluate` finds stand in `tensorboard/evaluate`, as a run beside it: whenever it is called, the
training's own files are let alone. After a restart from an older checkpoint the steps behind it are purged, which is
TensorBoard's own mechanism, so that none stands twice. Without the package the run goes on and says once what
is missing.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launcher.metrics import flat
from launcher.progress import Progress

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # the `tensorboard` package is missing: no event files, everything else as it is
    SummaryWriter = None

logger = logging.getLogger(__name__)


class TensorBoard:
    """A sink that writes event files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None
        self._failed = SummaryWriter is None
        if self._failed:
            logger.warning("TensorBoard is not installed (pip install tensorboard): the run goes on without it")

    def log(self, progress: Progress, record: Mapping[str, Any]) -> None:
        """Adds a point to each curve."""
        self._try(lambda: self._points(record["step"], record, purge=True))

    def event(self, event: Mapping[str, Any], place: int) -> None:
        """Events are no curves."""

    def figures(self, step: int, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Points of tasks, that may be asked of any step at any time: nothing is purged."""
        numbers = {name: value for name, value in flat(found).items() if isinstance(value, float)}
        self._try(lambda: self._points(step, {"tasks": numbers}, purge=False))

    def close(self, exit_code: int) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._try(self._writer.close)

    def _points(self, step: int, record: Mapping[str, Any], *, purge: bool) -> None:
        if self._writer is None:
            assert SummaryWriter is not None
            first = step if purge else None
            self._writer = SummaryWriter(str(self._directory), purge_step=first, flush_secs=30)
        for name, value in flat(record).items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name.replace(".", "/"), value, step)

    def _try(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except Exception as error:
            self._failed = True
            logger.warning("TensorBoard stopped (%s); the run goes on, metrics.jsonl has everything", error)
