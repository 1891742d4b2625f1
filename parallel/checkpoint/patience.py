"""Saves that may fail while training goes on: a full disk is emptied, a file server comes back.

Only what the operating system refused is passed over, on all ranks alike, because a failed save is one on all of them.
So many in a row may fail; the next one ends the run, and so does one after which no other came. Nothing is lost but
what would have to be trained again: the checkpoints before stand.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from parallel.common.errors import SystemFailure

_GOES_ON = "%s; training goes on and the next save tries again (%d of checkpoint.failures=%d)"

logger = logging.getLogger(__name__)


class Patience:
    """Counts the saves that failed since the last that did not.

    Args:
        failures: how many of them are passed over.
        told: is told why one failed.
    """

    def __init__(self, failures: int = 0, told: Callable[[str], None] = lambda why: None) -> None:
        self._allowed = failures
        self._told = told
        self._failed = 0
        self._last: SystemFailure | None = None

    @contextmanager
    def passing_over(self) -> Iterator[None]:
        """Runs (a part of) a save.

        Raises:
            SystemFailure: it failed, and so did too many before it.
        """
        try:
            yield
        except SystemFailure as error:
            self._failed += 1
            self._last = error
            if self._failed > self._allowed:
                raise
            if dist.get_rank() == 0:
                logger.warning(_GOES_ON, error, self._failed, self._allowed)
            self._told(str(error))

    def saved(self) -> None:
        """A save went well."""
        self._failed, self._last = 0, None

    def end(self) -> None:
        """No other save comes.

        Raises:
            SystemFailure: the last one failed.
        """
        if self._last is not None:
            raise self._last
