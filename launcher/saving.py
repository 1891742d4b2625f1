"""When a checkpoint is due: after so many steps, and where so much time has passed.

Clocks differ between hosts, so rank 0's decides, and its answer rides with what the ranks agree on after each step.
"""

import time
from collections.abc import Callable

from launcher.progress import Every
from parallel.config import CheckpointConfig


class Saving:
    """The steps after which a checkpoint is written; a stop is saved whatever this says."""

    def __init__(
        self, config: CheckpointConfig, *, total_steps: int, rank: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._steps = Every(config.every_steps, besides=(total_steps,))
        self._seconds = config.every_seconds if rank == 0 else None
        self._clock = clock
        self._saved = clock()
        self._late = False

    def ask(self) -> bool:
        """Whether it is time, on the rank whose clock counts."""
        return self._seconds is not None and self._clock() - self._saved >= self._seconds

    def answer(self, anywhere: bool) -> None:
        """Whether it is time."""
        self._late = anywhere

    def due(self, step: int) -> bool:
        """Whether to save after this step, for which the ranks have agreed."""
        return self._late or self._steps.due(step)

    def saved(self) -> None:
        """A checkpoint was begun: the clock starts anew."""
        self._saved = self._clock()
