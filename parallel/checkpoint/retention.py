"""Which checkpoints stay, and how the others go: renamed to a dot-name first, then removed.

So a kill in the middle leaves a dot-directory, which is never listed and is removed at the next save, and never a step
directory with files missing. One process at a time may do this: the holder of the run's lock.
"""

import logging
import shutil
from pathlib import Path

from parallel.checkpoint.manifest import whole_steps
from parallel.common.faults import fault_point
from parallel.common.files import sync_directory

logger = logging.getLogger(__name__)

_REMOVED = ".removed-"
_ATTEMPT = ".attempt-"


def keep_newest(root: Path, count: int, committed: Path) -> None:
    """Removes all whole checkpoints but the newest `count` and the one just committed.

    Steps without a whole manifest do not count and are left alone. A directory that cannot be removed is a warning:
    it must not end the training.
    """
    assert count >= 1
    for path in list(whole_steps(root).values())[:-count]:
        if path == committed:
            continue
        removed = root / f"{_REMOVED}{path.name}"
        try:
            path.rename(removed)
            sync_directory(root)
            fault_point("checkpoint.retention")
            shutil.rmtree(removed)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error)


def remove_leftovers(root: Path, attempt: str) -> None:
    """Removes what dead attempts left half-written or half-removed; nothing of the attempt that calls."""
    for path in root.glob(".*"):
        of_the_dead = path.name.startswith(_ATTEMPT) and not path.name.startswith(f"{_ATTEMPT}{attempt}-")
        if of_the_dead or path.name.startswith(_REMOVED):
            logger.info("removing %s, left by an attempt that ended", path)
            shutil.rmtree(path, ignore_errors=True)
