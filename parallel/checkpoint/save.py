"""Writing one checkpoint: everything under a name that nobody reads, then one rename.

    1. rank 0 makes checkpoints/.attempt-ATTEMPT-STEP
    2. every rank writes and hashes its own shards there, and flushes them to the disk
    3. rank 0 writes state.json, then manifest.json with every file's size and hash, and flushes them
    4. rank 0 sees that the run is still this attempt's
    5. rank 0 renames the directory to step-STEP and flushes checkpoints/: the commit

A kill before 5 leaves a dot-directory that is no checkpoint, a kill after it a whole one. An error on any rank is an
error on all; the half-written directory is removed.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from parallel.checkpoint.agreement import agreed, as_user_error, exchange
from parallel.checkpoint.background import HostCopy
from parallel.checkpoint.fence import WRITING, Fence
from parallel.checkpoint.manifest import STATE, TENSORS, FileRecord, Manifest, fingerprint, step_name, versions
from parallel.checkpoint.shards import write_shards
from parallel.common.errors import UserError
from parallel.common.faults import fault_point
from parallel.common.files import hash_file, sync_directory, write_json
from parallel.common.stateful import Stateful

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What goes into one checkpoint from this rank."""

    step: int
    metrics: dict[str, float]
    tensors: dict[str, list[ShardedTensor]]
    """By participant; empty for one whose state is JSON, or whose tensors are all on other ranks."""
    states: dict[str, Any]
    """The JSON states by participant, of all that have no tensors here."""

    @classmethod
    def of(cls, step: int, participants: Mapping[str, Stateful], metrics: Mapping[str, float]) -> "Content":
        """Asks every participant for its state; tensors are the participants' own memory, JSON is copied."""
        tensors: dict[str, list[ShardedTensor]] = {}
        states: dict[str, Any] = {}
        for name, participant in participants.items():
            state = participant.state_dict()
            tensors[name] = [value for value in state.values() if isinstance(value, ShardedTensor)]
            if not tensors[name]:
                states[name] = json.loads(json.dumps(state, allow_nan=False))
            elif len(tensors[name]) < len(state):
                raise TypeError(f"the state of {name} mixes sharded tensors with other values")
        return cls(step=step, metrics=dict(metrics), tensors=tensors, states=states)

    def copied(self, copy: HostCopy) -> "Content":
        """The same content, detached from the participants: they may go on."""
        with torch.no_grad(), copy.copying():
            return replace(self, tensors={name: copy.of(tensors) for name, tensors in self.tensors.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWriter:
    """Writes the checkpoints of one attempt; every rank calls its methods."""

    root: Path
    """The run's `checkpoints` directory; made at the first save."""
    fence: Fence
    layout: dict[str, Any]
    config: dict[str, Any]
    group: ProcessGroup | None
    """All ranks over the hosts, for what they agree on; by default torch's own group of all ranks."""

    def prepare(self, step: int) -> None:
        """Makes the directory that `write` fills.

        Raises:
            UserError: on all ranks; the step exists, the directory cannot be made, or the run has gone over to another
                attempt.
        """
        doing = self._doing(step)
        with agreed(doing, self.group):
            if dist.get_rank() == 0:
                self.fence.check(doing)
                _prepare(self.root / step_name(step), self._temporary(step), self.fence.attempt)

    def write(self, content: Content, copy: HostCopy | None = None) -> Path:
        """Writes and commits `root/step-STEP`; with `copy` of the tensors as they are while it copies them.

        Raises:
            UserError: on all ranks; a file cannot be written (which, and why), or the run has gone over to another
                attempt. No checkpoint that stood before is touched.
        """
        target, temporary = self.root / step_name(content.step), self._temporary(content.step)
        doing = self._doing(content.step)
        try:
            if copy is not None:
                with agreed(doing, self.group):
                    content = content.copied(copy)
            keys = _keys(content, self.group)
            tensors = [tensor for name in keys for tensor in content.tensors[name]]
            files = self._write_tensors(temporary, tensors, doing) if keys else {}
            with agreed(doing, self.group):
                if dist.get_rank() == 0:
                    self._seal(temporary, content, keys, files)
                    _commit(temporary, target, self.fence, doing)
        except Exception:
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return target

    def _doing(self, step: int) -> str:
        return f"save the checkpoint {self.root / step_name(step)}"

    def _temporary(self, step: int) -> Path:
        return self.root / f"{WRITING}{self.fence.attempt}-{step:08d}"

    def _write_tensors(self, temporary: Path, tensors: list[ShardedTensor], doing: str) -> dict[str, FileRecord]:
        """Every rank's shards; returns the files of all ranks, paths relative to the step directory."""
        try:
            mine = write_shards(temporary / TENSORS, tensors, self.group)
        except CheckpointException as error:  # raised on all ranks alike
            rank, (cause, _) = min(error.failures.items())
            if isinstance(cause, OSError):
                raise as_user_error(cause, f"{doing} on rank {rank}") from error
            raise RuntimeError(f"rank {rank} cannot {doing}: {cause}") from error
        with agreed(doing, self.group):
            if dist.get_rank() == 0:
                sync_directory(temporary / TENSORS)
        return {f"{TENSORS}/{name}": record for files in exchange(mine, self.group) for name, record in files.items()}

    def _seal(
        self, temporary: Path, content: Content, keys: Mapping[str, list[str]], files: dict[str, FileRecord]
    ) -> None:
        """Everything that is not tensors, the manifest last."""
        write_json(temporary / STATE, {name: state for name, state in content.states.items() if name not in keys})
        files[STATE] = FileRecord(bytes=(temporary / STATE).stat().st_size, hash=hash_file(temporary / STATE))
        fault_point("checkpoint.before_manifest")
        Manifest(
            step=content.step,
            attempt=self.fence.attempt,
            layout=self.layout,
            config=self.config,
            config_fingerprint=fingerprint(self.config),
            versions=versions(),
            metrics=content.metrics,
            participants={name: keys.get(name) for name in content.tensors},
            files=dict(sorted(files.items())),
        ).write(temporary)
        fault_point("checkpoint.after_manifest")


def _prepare(target: Path, temporary: Path, attempt: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        try:
            Manifest.read(target)
        except UserError as error:
            put_aside(target, attempt, error)
        else:
            raise UserError(f"{target} exists already: a checkpoint is never overwritten")
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / TENSORS).mkdir(parents=True)


def put_aside(path: Path, attempt: str, why: object) -> None:
    """Renames a damaged step directory, for whoever wants to look; no crash of ours leaves one."""
    aside = path.with_name(f".damaged-{path.name}-before-{attempt}")
    path.rename(aside)
    logger.warning("%s; it was renamed to %s", why, aside)


def _keys(content: Content, group: ProcessGroup | None) -> dict[str, list[str]]:
    """The participants whose state is sharded tensors, with the names of their global tensors on all ranks."""
    mine = {
        name: ({tensor.key for tensor in tensors}, "" if tensors else fingerprint(content.states[name]))
        for name, tensors in content.tensors.items()
    }
    everywhere = exchange(mine, group)
    keys: dict[str, list[str]] = {}
    for name in mine:
        union = set().union(*(rank[name][0] for rank in everywhere))
        if union:
            keys[name] = sorted(union)
        elif len({rank[name][1] for rank in everywhere}) != 1:
            raise RuntimeError(f"the JSON state of {name} is not the same on all ranks")
    owned = [key for names in keys.values() for key in names]
    if len(owned) != len(set(owned)):
        raise RuntimeError("two participants use the same name for a tensor")
    return keys


def _commit(temporary: Path, target: Path, fence: Fence, doing: str) -> None:
    sync_directory(temporary)
    fault_point("checkpoint.before_rename")
    fence.check(doing)
    temporary.rename(target)
    fault_point("checkpoint.after_rename")
    sync_directory(target.parent)
