"""A step directory that holds weights and nothing else, written tensor by tensor, as every layout loads it.

It is what `checkpoint.load_parts=weights`, `generate`, `evaluate` and `export` start from; there is no state to resume.
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


def write_weights(
    checkpoints: Path,
    step: int,
    shapes: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    *,
    config: RunConfig,
    layout: Mapping[str, Any],
    attempt: str,
) -> None:
    """Writes the directory of `step` below `checkpoints`, its manifest last.

    Args:
        checkpoints: of a run that is being made.
        step: optimizer steps done.
        shapes: by `weight.NAME`, tensors on the meta device: shape and dtype.
        make: the tensor of a name, contiguous; called once for each.
        config: of the run that the weights are of.
        layout: a record of where they come from.
        attempt: token of whoever writes.
    """
    path = checkpoints / step_name(step)
    (path / TENSORS).mkdir(parents=True)
    written = write_tensors(path / TENSORS, shapes, make)
    records = {f"{TENSORS}/{name}": record for name, record in written.items()}
    write_json(path / STATE, {})
    records[STATE] = FileRecord(bytes=(path / STATE).stat().st_size, hash=hash_file(path / STATE))
    Manifest(
        step=step,
        attempt=attempt or secrets.token_hex(8),
        layout=dict(layout),
        config=configuration.to_dict(config),
        config_fingerprint=fingerprint(configuration.to_dict(config)),
        versions=versions(),
        metrics={},
        participants={"model": sorted(shapes)},
        files=dict(sorted(records.items())),
    ).write(path)
