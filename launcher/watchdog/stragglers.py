"""Who is slow: every so many steps the ranks compare when each of them entered the same collective operations.

A rank that is late makes all others wait, so the step takes as long as the slowest; nothing else in a step's times says
which one that was. The slow one is named by rank and host, and the run goes on. A look costs some 20 ms.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from launcher.watchdog.collectives import Operation, arrivals, waited_for
from launcher.watchdog.config import WatchdogConfig
from launcher.watchdog.pulse import Steps

logger = logging.getLogger(__name__)


class Stragglers:
    """Rides with what the ranks agree on after each step, because all of them come there at the same step."""

    def __init__(
        self,
        config: WatchdogConfig,
        *,
        progress: Steps,
        group: ProcessGroup,
        hosts: Sequence[str],
        event: Callable[..., None],
    ) -> None:
        self._config = config
        self._progress = progress
        self._group = group
        self._hosts = hosts
        self._event = event
        self._since_ns = 0

    def ask(self) -> bool:
        """Looks, where it is time; nothing to agree on comes of it."""
        step = self._progress.step + 1
        if not self._since_ns:
            self._since_ns = time.time_ns()  # the first step is slow for everybody
        elif step % self._config.straggler_steps == 0:
            mine, first = arrivals(self._since_ns), dist.get_rank() == 0
            nothing: Mapping[Operation, int] = {}
            entered = [nothing] * len(self._hosts) if first else None
            dist.gather_object(mine, entered, dst=0, group=self._group)
            now = time.time_ns()
            if entered is not None:
                self._tell(step, entered, (now - self._since_ns) / 1e9)
            self._since_ns = now
        return False

    def answer(self, anywhere: bool) -> None:
        """Nobody asked."""

    def _tell(self, step: int, entered: Sequence[Mapping[Operation, int]], seconds: float) -> None:
        for rank, waited in enumerate(waited_for(entered)):
            if waited < self._config.straggler_share * seconds:
                continue
            host, share = self._hosts[rank], waited / seconds
            logger.warning(
                "rank %d on %s is slow: the others waited for it %.0f %% of the time of the last steps", rank, host,
                100 * share,
            )  # fmt: skip
            self._event("straggler", step=step, rank=rank, host=host, share=share)
