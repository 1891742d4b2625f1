"""Which attempt a run belongs to: only that one may change the run's checkpoints.

A node that froze and comes back, or a job that was requeued while its first start still runs, is an attempt that does
not know that it is over. Two things together keep it from committing anything. The token of the holder is read just
before the rename. And whoever takes a run over first writes its token and then moves away every directory that others
were writing; a move is atomic, so that a rename by the old attempt comes either before (and its checkpoint is whole,
and found) or fails.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from parallel.common.errors import UserError
from parallel.common.faults import fault_point
from parallel.common.files import sync_directory

logger = logging.getLogger(__name__)

WRITING = ".attempt-"
REMOVED = ".removed-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fence:
    """An attempt, and how to see whether the run is still its own."""

    attempt: str
    """Token of this attempt."""
    holder: Callable[[], str | None]
    """Reads the token of the attempt that the run belongs to now; None where nobody can tell."""

    def check(self, doing: str) -> None:
        """Refuses an attempt that is over.

        Raises:
            UserError: the run belongs to another attempt now; `doing` says what is not done because of it.
        """
        holder = self.holder()
        if holder != self.attempt:
            other = f"belongs to the attempt {holder} now" if holder else "no longer says to whom it belongs"
            raise UserError(f"cannot {doing}: the run {other}, and this is the attempt {self.attempt}, which is over")


def claim(root: Path, attempt: str) -> None:
    """Removes what other attempts left half-written or half-removed; called once, after the token was written."""
    for path in root.glob(".*"):
        if path.name.startswith(WRITING) and not path.name.startswith(f"{WRITING}{attempt}-"):
            logger.info("removing %s, left by an attempt that ended", path)
            with suppress(FileNotFoundError):  # committed this very moment: then it is whole
                remove(path)
        elif path.name.startswith(REMOVED):
            shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes a directory under `checkpoints/`: out of sight first, in one rename, then file by file.

    Raises:
        OSError: it cannot be renamed. What cannot be deleted afterwards stays under its new name.
    """
    out_of_sight = path.with_name(f"{REMOVED}{path.name.lstrip('.')}")
    shutil.rmtree(out_of_sight, ignore_errors=True)
    path.rename(out_of_sight)
    sync_directory(path.parent)
    fault_point("checkpoint.retention")
    shutil.rmtree(out_of_sight, ignore_errors=True)
