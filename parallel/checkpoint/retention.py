"""Which checkpoints stay, and how the others go: renamed to a dot-name first, then removed.

So a kill in the middle leaves a dot-directory, which is never listed and is removed by the next attempt, and never a
step directory with files missing. One process at a time may do this: the holder of the run's lock.
"""

import logging
from pathlib import Path

from parallel.checkpoint.fence import remove
from parallel.checkpoint.manifest import whole_steps

logger = logging.getLogger(__name__)


def keep_newest(root: Path, count: int, committed: Path) -> None:
    """Removes all whole checkpoints but the newest `count` and the one just committed.

    Steps without a whole manifest do not count and are left alone. A directory that cannot be removed is a warning:
    it must not end the training.
    """
    assert count >= 1
    for path in list(whole_steps(root).values())[:-count]:
        if path == committed:
            continue
        try:
            remove(path)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error)
