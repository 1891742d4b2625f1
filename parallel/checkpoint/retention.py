"""Which checkpoints stay, and how the others go: renamed to a dot-name first, then removed.

So a kill in the middle leaves a dot-directory, which is never listed and is removed by the next attempt, and never a
step directory with files missing. One process at a time may do this: the holder of the run's lock. The newest whole
checkpoint always stays. Imports without torch.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from parallel.checkpoint.fence import remove
from parallel.checkpoint.manifest import Manifest, whole_manifests
from parallel.config import BestMetric, CheckpointConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """The rules by which a checkpoint stays; any one of them is enough."""

    newest: int
    """How many of the highest steps stay, at least 1."""
    every_steps: int | None = None
    """Multiples of it stay for ever."""
    best: int = 0
    """How many of those with the lowest metric stay."""
    best_by: BestMetric = BestMetric.validation_loss

    @classmethod
    def of(cls, config: CheckpointConfig) -> "Retention":
        """The rules that a configuration names."""
        return cls(
            newest=config.keep, every_steps=config.keep_every_steps, best=config.keep_best, best_by=config.best_by
        )

    def changed(self, **rules: Any) -> "Retention":
        """The same rules but for those given, by the names of the fields."""
        return replace(self, **rules)

    def reasons(self, manifests: Mapping[Path, Manifest]) -> dict[Path, list[str]]:
        """{step directory: why it stays}, in words; without any, it goes."""
        assert self.newest >= 1
        by_step = sorted(manifests, key=lambda path: manifests[path].step)
        measured = [path for path in by_step if self.best_by in manifests[path].metrics]
        best = sorted(measured, key=lambda path: manifests[path].metrics[self.best_by])[: self.best]
        found: dict[Path, list[str]] = {path: [] for path in by_step}
        for path in by_step[-self.newest :]:
            found[path].append("newest")
        for path in by_step:
            if self.every_steps is not None and manifests[path].step % self.every_steps == 0:
                found[path].append(f"every {self.every_steps}")
        for path in best:
            found[path].append(f"best {self.best_by} {manifests[path].metrics[self.best_by]:.4g}")
        return found


def prune(root: Path, retention: Retention, *, besides: Collection[Path] = ()) -> list[Path]:
    """Removes the whole checkpoints that no rule keeps; returns them.

    Steps without a whole manifest do not count and are left alone. A directory that cannot be removed is a warning:
    it must not end the training.

    Args:
        root: the run's `checkpoints` directory.
        retention: the rules.
        besides: step directories that stay whatever the rules say: the one just committed, one that is being copied.
    """
    removed = []
    for path, reasons in retention.reasons(whole_manifests(root)).items():
        if reasons or path in besides:
            continue
        try:
            remove(path)
        except OSError as error:
            logger.warning("cannot remove the old checkpoint %s: %s", path, error)
        else:
            removed.append(path)
    return removed
