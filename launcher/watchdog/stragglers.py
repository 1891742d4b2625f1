"""Who is slow: every so many steps the ranks compare when each of them entered the same collective operations.

A rank that is late makes all others wait, so the step takes as long as the slowest; nothing else in a step's times says
which one that was. The slow one is named by rank and host, and the run goes on. A look costs some 20 ms.

On a machine with other work every rank is late now and then. So a rank is named only where it stays behind: further
than the median of the others, in several looks in a row, each of which spans some seconds. It is named again only after
some minutes, and only if it had caught up in between or has become much slower.
"""

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from torch.distributed import ProcessGroup

from launcher.watchdog.collectives import Operation, arrivals, waited_for
from launcher.watchdog.config import WatchdogConfig
from launcher.watchdog.pulse import Steps

logger = logging.getLogger(__name__)

_MUCH_SLOWER = 1.5


class Suspicion:
    """Which ranks to name, from the share of the time that all others waited for each."""

    def __init__(self, config: WatchdogConfig) -> None:
        self._config = config
        self._looks: dict[int, int] = {}
        self._told: dict[int, tuple[float, float]] = {}

    def named(self, shares: Sequence[float], now: float) -> list[int]:
        """Ranks that are slow and of whom it has to be said.

        Args:
            shares: by rank, in one look.
            now: seconds of a clock that only goes on.
        """
        return [
            rank for rank in range(len(shares)) if self._is_behind(rank, shares) and self._is_news(rank, shares, now)
        ]

    def _is_behind(self, rank: int, shares: Sequence[float]) -> bool:
        usual = statistics.median([*shares[:rank], *shares[rank + 1 :]])
        behind = shares[rank] - usual >= self._config.straggler_share
        self._looks[rank] = self._looks.get(rank, 0) + 1 if behind else 0
        if not behind and rank in self._told:
            self._told[rank] = (self._told[rank][0], 0.0)
        return self._looks[rank] >= self._config.straggler_looks

    def _is_news(self, rank: int, shares: Sequence[float], now: float) -> bool:
        if rank in self._told:
            at, share = self._told[rank]
            if now - at < self._config.straggler_quiet_seconds or shares[rank] < share * _MUCH_SLOWER:
                return False
        self._told[rank] = (now, shares[rank])
        return True


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
        self._suspicion = Suspicion(config)
        self._seconds, self._waited = 0.0, [0.0] * len(hosts)

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
                self._look(step, entered, (now - self._since_ns) / 1e9)
            self._since_ns = now
        return False

    def answer(self, anywhere: bool) -> None:
        """Nobody asked."""

    def _look(self, step: int, entered: Sequence[Mapping[Operation, int]], seconds: float) -> None:
        self._seconds += seconds
        self._waited = [before + more for before, more in zip(self._waited, waited_for(entered), strict=True)]
        if self._seconds < self._config.straggler_seconds:
            return
        shares = [waited / self._seconds for waited in self._waited]
        for rank in self._suspicion.named(shares, time.monotonic()):
            logger.warning(
                "rank %d on %s is slow: the others waited for it %.0f %% of the time of the last steps",
                rank, self._hosts[rank], 100 * shares[rank],
            )  # fmt: skip
            self._event("straggler", step=step, rank=rank, host=self._hosts[rank], share=shares[rank])
        self._seconds, self._waited = 0.0, [0.0] * len(self._hosts)
