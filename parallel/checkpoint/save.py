"""Writing one checkpoint: everything under a name that nobody reads, then one rename.

    1. rank 0 makes checkpoints/.attempt-ATTEMPT-STEP
    2. every rank writes and hashes its own shards there, and flushes them to the disk
    3. rank 0 writes state.json, then manifest.json with every file's size and hash, and flushes them
    4. rank 0 sees that the run is still this attempt's
    5. rank 0 renames the directory to step-STEP and flushes checkpoints/: the commit

A kill before 5 leaves a dot-directory that is no checkpoint, a kill after it a whole one. An error on any rank is an
error on all; the half-written directory is removed.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from parallel.checkpoint.agreement import agreed, as_user_error, exchange
from parallel.checkpoint.fence import WRITING, Fence
from parallel.checkpoint.manifest import STATE, TENSORS, FileRecord, Manifest, fingerprint, step_name
from parallel.checkpoint.shards import write_shards
from parallel.common.errors import UserError
from parallel.common.faults import fault_point
from parallel.common.files import hash_file, sync_directory, write_json
from parallel.common.stateful import Stateful

logger = logging.getLogger(__name__)


def save(
    root: Path,
    step: int,
    participants: Mapping[str, Stateful],
    *,
    fence: Fence,
    layout: dict[str, Any],
    config_fingerprint: str,
    versions: dict[str, str],
) -> Path:
    """Writes and commits `root/step-STEP`; every rank calls this.

    Raises:
        UserError: on all ranks; the step exists, a file cannot be written (which, and why), or the run has gone over
            to another attempt. No checkpoint that stood before is touched.
    """
    target = root / step_name(step)
    temporary = root / f"{WRITING}{fence.attempt}-{step:08d}"
    doing = f"save the checkpoint {target}"
    with agreed(doing):
        if dist.get_rank() == 0:
            fence.check(doing)
            _prepare(target, temporary, fence.attempt)
    try:
        # Outside `agreed`: a participant may gather its state over ranks.
        states = {name: participant.state_dict() for name, participant in participants.items()}
        with agreed(doing):
            contents = {name: _content(name, state) for name, state in states.items()}
        tensor_keys = _tensor_keys(contents)
        tensors = [value for name in tensor_keys for value in states[name].values()]
        json_states = {name: state for name, state in states.items() if name not in tensor_keys}
        files = _write_tensors(temporary, tensors, doing) if tensor_keys else {}
        with agreed(doing):
            if dist.get_rank() == 0:
                write_json(temporary / STATE, json_states)
                files[STATE] = FileRecord(bytes=(temporary / STATE).stat().st_size, hash=hash_file(temporary / STATE))
                fault_point("checkpoint.before_manifest")
                Manifest(
                    step=step,
                    attempt=fence.attempt,
                    layout=layout,
                    config_fingerprint=config_fingerprint,
                    versions=versions,
                    participants={name: tensor_keys.get(name) for name in states},
                    files=dict(sorted(files.items())),
                ).write(temporary)
                fault_point("checkpoint.after_manifest")
                _commit(temporary, target, fence, doing)
    except Exception:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def _prepare(target: Path, temporary: Path, attempt: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        try:
            Manifest.read(target)
        except UserError as error:
            # No crash of ours leaves this: the disk was damaged. It is kept for whoever wants to look.
            aside = target.with_name(f".damaged-{target.name}-before-{attempt}")
            target.rename(aside)
            logger.warning("%s; it was renamed to %s", error, aside)
        else:
            raise UserError(f"{target} exists already: a checkpoint is never overwritten")
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / TENSORS).mkdir(parents=True)


def _content(name: str, state: Mapping[str, Any]) -> tuple[set[str], str]:
    """What a state is on this rank: the names of its global tensors, or a fingerprint of its JSON."""
    keys = {value.key for value in state.values() if isinstance(value, ShardedTensor)}
    if keys and not all(isinstance(value, ShardedTensor) for value in state.values()):
        raise TypeError(f"the state of {name} mixes sharded tensors with other values")
    return keys, "" if keys else fingerprint(state)


def _tensor_keys(contents: Mapping[str, tuple[set[str], str]]) -> dict[str, list[str]]:
    """The participants whose state is sharded tensors, with the names of their global tensors on all ranks."""
    everywhere = exchange(contents)
    keys: dict[str, list[str]] = {}
    for name in contents:
        union = set().union(*(rank[name][0] for rank in everywhere))
        if union:
            keys[name] = sorted(union)
        elif len({rank[name][1] for rank in everywhere}) != 1:
            raise RuntimeError(f"the JSON state of {name} is not the same on all ranks")
    owned = [key for names in keys.values() for key in names]
    if len(owned) != len(set(owned)):
        raise RuntimeError("two participants use the same name for a tensor")
    return keys


def _write_tensors(temporary: Path, tensors: list[ShardedTensor], doing: str) -> dict[str, FileRecord]:
    """Every rank's shards; returns the files of all ranks, paths relative to the step directory."""
    try:
        mine = write_shards(temporary / TENSORS, tensors)
    except CheckpointException as error:  # raised on all ranks alike
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise as_user_error(cause, f"{doing} on rank {rank}") from error
        raise RuntimeError(f"rank {rank} cannot {doing}: {cause}") from error
    with agreed(doing):
        if dist.get_rank() == 0:
            sync_directory(temporary / TENSORS)
    return {f"{TENSORS}/{name}": record for files in exchange(mine) for name, record in files.items()}


def _commit(temporary: Path, target: Path, fence: Fence, doing: str) -> None:
    sync_directory(temporary)
    fault_point("checkpoint.before_rename")
    fence.check(doing)
    temporary.rename(target)
    fault_point("checkpoint.after_rename")
    sync_directory(target.parent)
