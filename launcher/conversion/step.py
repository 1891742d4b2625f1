"""A step directory that is made of tensors from elsewhere, written one by one, as every layout loads it.

With weights and nothing else it is what `checkpoint.load_parts=weights`, `generate`, `evaluate` and `export` need.
"""

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher import config as configuration
from launcher.config import RunConfig
from parallel.checkpoint.manifest import STATE, TENSORS, FileRecord, Manifest, fingerprint, step_name, versions
from parallel.checkpoint.stream import write_tensors
from parallel.common.files import hash_file, write_json


def write_step(
    checkpoints: Path,
    step: int,
    shapes: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    *,
    participants: Mapping[str, list[str] | None],
    states: Mapping[str, Any],
    config: RunConfig,
    layout: Mapping[str, Any],
    attempt: str,
) -> None:
    """Writes the directory of `step` below `checkpoints`, its manifest last.

    Args:
        checkpoints: of a run that is being made.
        step: optimizer steps done.
        shapes: by name, tensors on the meta device: shape and dtype.
        make: the tensor of a name, contiguous; called once for each.
        participants: {name: its tensors; None where it has only a state}.
        states: {name: what it keeps besides}.
        config: of the run that the tensors are of.
        layout: a record of where they come from.
        attempt: token of whoever writes.
    """
    path = checkpoints / step_name(step)
    (path / TENSORS).mkdir(parents=True)
    written = write_tensors(path / TENSORS, shapes, make)
    records = {f"{TENSORS}/{name}": record for name, record in written.items()}
    write_json(path / STATE, dict(states))
    records[STATE] = FileRecord(bytes=(path / STATE).stat().st_size, hash=hash_file(path / STATE))
    Manifest(
        step=step,
        attempt=attempt or secrets.token_hex(8),
        layout=dict(layout),
        config=configuration.to_dict(config),
        config_fingerprint=fingerprint(configuration.to_dict(config)),
        versions=versions(),
        metrics={},
        participants=dict(participants),
        files=dict(sorted(records.items())),
    ).write(path)
