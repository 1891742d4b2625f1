"""The checkpoints of a run: format version 1.

    checkpoints/step-00000120/manifest.json   written last; makes the directory a checkpoint
                              state.json      {participant: JSON state}
                              tensors/        torch DCP, one file a rank; sharded tensors only
    checkpoints/.attempt-*                    being written; nobody reads it

The layout that wrote a checkpoint is a record in its manifest; any other layout loads it, because every tensor is kept
under a global name with its global shape. There is no `latest` file: the newest is the highest step with a whole
manifest. One process group at a time may save into a run; the launcher's lock and the fence see to that.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.checkpoint.agreement import agreed, exchange
from parallel.checkpoint.background import Background, HostCopy
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.load import load
from parallel.checkpoint.manifest import DamagedCheckpoint, Manifest, step_directories
from parallel.checkpoint.mirror import Mirror
from parallel.checkpoint.patience import Patience
from parallel.checkpoint.retention import Retention, prune
from parallel.checkpoint.save import Content, StepWriter, put_aside
from parallel.common.stateful import Stateful

logger = logging.getLogger(__name__)

_MIRROR_SECONDS = 300.0
"""The other ranks wait for rank 0 meanwhile: less than the limit of a collective."""
Committed = Callable[..., None]
"""Called on rank 0 after a commit with `checkpoint`, the directory's name, and `seconds`, what writing it took."""


class Checkpoints:
    """Saves, lists and loads the checkpoints under one directory.

    Args:
        root: the run's `checkpoints` directory; made at the first save.
        retention: which checkpoints stay.
        fence: names this start of the run, in letters, digits, `.`, `_` and `-`; sees whether the run is its own.
        layout: JSON record of the parallel degrees.
        config: JSON form of the run's configuration; recorded.
        group: all ranks over the hosts (gloo), for what they agree on; by default torch's own group of all ranks. With
            `asynchronous` nobody else may use it.
        asynchronous: whether a thread copies everything to the host's memory and writes it, while `save` has returned;
            then `copied` must be called before tensors of the participants change.
        mirror: path or URL where rank 0 copies committed checkpoints to.
        patience: which saves may fail; by default none.
    """

    def __init__(
        self,
        root: Path,
        *,
        retention: Retention,
        fence: Fence,
        layout: dict[str, Any],
        config: dict[str, Any],
        group: ProcessGroup | None = None,
        asynchronous: bool = False,
        mirror: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        assert re.fullmatch(r"[A-Za-z0-9._-]+", fence.attempt), fence.attempt
        self.root = root
        self._retention = retention
        self._group = group
        self._background = Background()
        self._patience = patience or Patience()
        self._copy = HostCopy() if asynchronous else None
        self._mirror = Mirror(root, mirror) if mirror is not None and dist.get_rank() == 0 else None
        self._writer = StepWriter(root=root, fence=fence, layout=layout, config=config, group=group)

    def save(
        self,
        step: int,
        participants: Mapping[str, Stateful],
        *,
        metrics: Mapping[str, float] | None = None,
        committed: Committed | None = None,
    ) -> None:
        """Writes and commits the checkpoint of `step`, then removes old ones; every rank calls this.

        One that is still being written is waited for first. An error of a write in the background is raised by
        whichever of `save`, `answer` and `wait` comes next.

        Args:
            step: optimizer steps done.
            participants: what it keeps, by name.
            metrics: what is known of this step, for the manifest and for `best_by`.
            committed: told of the commit.

        Raises:
            UserError: on all ranks; see `parallel.checkpoint.save`. Not if `patience` passes over it.
        """
        self.wait()
        started = time.perf_counter()
        content = Content.of(step, participants, metrics or {})
        with self._patience.passing_over():
            self._writer.prepare(step)
            if self._copy is None:
                self._write(content, started, committed)
            else:
                self._copy.begin()
                self._background.start(partial(self._write, content, started, committed))

    def copied(self) -> None:
        """Returns when the tensors of the participants may change: a save in the background has copied them.

        An error of the copy is raised where those of the write are.
        """
        if self._copy is not None:
            self._copy.wait()

    def _write(self, content: Content, started: float, committed: Committed | None) -> None:
        path = self._writer.write(content, self._copy)
        with agreed(f"finish the checkpoint {path}", self._group):
            if dist.get_rank() == 0:
                if committed is not None:
                    committed(checkpoint=path.name, seconds=time.perf_counter() - started)
                self._clear_away(path)
        self._patience.saved()

    def _clear_away(self, committed: Path) -> None:
        """Copies and removes what is to be copied and removed after a commit; on rank 0."""
        if self._mirror is None:
            prune(self.root, self._retention, besides=(committed,))
            return
        with self._mirror.untouched() as copying:
            prune(self.root, self._retention, besides=(committed, *copying))
        self._mirror.push()

    def ask(self) -> bool:
        """Whether a write in the background has failed on this rank and nobody knows."""
        return self._background.failed()

    def answer(self, anywhere: bool) -> None:
        """Learns whether that is so on some rank.

        Raises:
            UserError: on all ranks, if it is; what went wrong. Not if `patience` passes over it.
        """
        if anywhere and self._ended_well():
            raise RuntimeError("the save in the background failed on another rank")

    def wait(self) -> None:
        """Returns when nothing is being written any more; every rank calls this.

        Raises:
            UserError: on all ranks; what went wrong in the background. Not if `patience` passes over it.
        """
        self._ended_well()

    def finish(self, *, mirror: bool) -> None:
        """Returns when nothing is being written any more and the last save went well; every rank calls this.

        Args:
            mirror: whether to wait for the copies, too, for some minutes at most.

        Raises:
            UserError: on all ranks; why the last save failed.
        """
        self.wait()
        self._patience.end()
        if mirror and self._mirror is not None:
            self._mirror.wait(_MIRROR_SECONDS)

    def _ended_well(self) -> bool:
        """Waits for the write in the background; False where it failed and was passed over."""
        with self._patience.passing_over():
            self._background.wait()
            return True
        return False

    def close(self) -> None:
        """Lets a write in the background end, whatever else went wrong; its error is only logged."""
        try:
            self._background.wait()
        except Exception:
            logger.exception("the checkpoint in the background was not saved")

    def load(
        self,
        path: Path,
        participants: Mapping[str, Stateful],
        *,
        may_differ: Callable[[str], bool] = lambda _: False,
        stands_for: Callable[[str], str] = lambda name: name,
    ) -> Manifest:
        """Gives each participant its state back from a step directory, after verifying it; every rank calls this.

        Args:
            path: the step directory.
            participants: who gets a state back.
            may_differ: whether a tensor, by its name, may be on one side alone.
            stands_for: under which name the checkpoint may have one instead.

        Raises:
            UserError: on all ranks; see `parallel.checkpoint.load`.
        """
        self.copied()
        manifest = load(path, participants, self._group, may_differ=may_differ, stands_for=stands_for)
        logger.info("loaded %s, written by attempt %s in layout %s", path, manifest.attempt, manifest.layout)
        return manifest

    def resume(self, participants: Mapping[str, Stateful], *, fallback: bool) -> Path | None:
        """Goes on from the newest checkpoint, or says that there is none; every rank calls this.

        Args:
            participants: who gets a state back.
            fallback: whether a damaged checkpoint is put aside, so that the newest whole one is taken. Without it the
                newest is loaded or refused, because going back must not happen unseen.

        Raises:
            DamagedCheckpoint: on all ranks; names the damaged file. With `fallback`, if no checkpoint is left.
            UserError: on all ranks; the checkpoint does not fit.
        """
        damaged: list[str] = []
        found = list(step_directories(self.root).values())
        for path in reversed(exchange(found, self._group)[0]):  # as rank 0 sees it, wherever a file server is late
            try:
                self.load(path, participants)
            except DamagedCheckpoint as error:
                if not fallback:
                    hint = "checkpoint.fallback=true puts it aside and goes on from the newest whole one"
                    raise DamagedCheckpoint(f"{error}; {hint}") from error
                damaged.append(str(error))
                with agreed(f"put {path} aside", self._group):
                    if dist.get_rank() == 0:
                        put_aside(path, self._writer.fence.attempt, error)
            else:
                return path
        if damaged:
            raise DamagedCheckpoint(f"no checkpoint of the run is whole: {'; '.join(damaged)}")
        return None
