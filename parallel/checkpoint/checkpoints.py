"""The checkpoints of a run: format version 1.

    checkpoints/step-00000120/manifest.json   written last; makes the directory a checkpoint
                              state.json      {participant: JSON state}
                              tensors/        torch DCP, one file a rank; sharded tensors only
    checkpoints/.attempt-*                    being written; nobody reads it

The layout that wrote a checkpoint is a record in its manifest; any other layout loads it, because every tensor is kept
under a global name with its global shape. There is no `latest` file: the newest is the highest step with a whole
manifest. One process group at a time may save into a run; the launcher's lock sees to that.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from parallel.checkpoint.fence import Fence
from parallel.checkpoint.load import load
from parallel.checkpoint.manifest import fingerprint, versions, whole_steps
from parallel.checkpoint.retention import keep_newest
from parallel.checkpoint.save import save
from parallel.common.stateful import Stateful

logger = logging.getLogger(__name__)


class Checkpoints:
    """Saves, lists and loads the checkpoints under one directory.

    Args:
        root: the run's `checkpoints` directory; made at the first save.
        keep: newest whole checkpoints that stay, at least 1.
        fence: names this start of the run, in letters, digits, `.`, `_` and `-`; sees whether the run is its own.
        layout: JSON record of the parallel degrees.
        config: JSON form of the run's configuration; its fingerprint is recorded.
    """

    def __init__(self, root: Path, *, keep: int, fence: Fence, layout: dict[str, Any], config: dict[str, Any]) -> None:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", fence.attempt), fence.attempt
        self.root = root
        self._keep = keep
        self._fence = fence
        self._layout = layout
        self._config_fingerprint = fingerprint(config)

    def save(self, step: int, participants: Mapping[str, Stateful]) -> Path:
        """Writes and commits the checkpoint of `step`, then removes old ones; every rank calls this.

        Raises:
            UserError: on all ranks; see `parallel.checkpoint.save`.
        """
        path = save(
            self.root,
            step,
            participants,
            fence=self._fence,
            layout=self._layout,
            config_fingerprint=self._config_fingerprint,
            versions=versions(),
        )
        if dist.get_rank() == 0:
            keep_newest(self.root, self._keep, path)
        return path

    def load(self, path: Path, participants: Mapping[str, Stateful]) -> None:
        """Gives each participant its state back from a step directory, after verifying it; every rank calls this.

        Raises:
            UserError: on all ranks; see `parallel.checkpoint.load`.
        """
        manifest = load(path, participants)
        logger.info("loaded %s, written by attempt %s in layout %s", path, manifest.attempt, manifest.layout)

    def newest(self) -> Path | None:
        """The step directory with the highest step whose manifest is whole."""
        return max(whole_steps(self.root).items(), default=(0, None))[1]

    def steps(self) -> list[int]:
        """The steps with a whole manifest, ascending."""
        return list(whole_steps(self.root))
