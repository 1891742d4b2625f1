"""The mean of several checkpoints' weights as a checkpoint of its own (Izmailov et al., 2018, arXiv:1803.05407).

Tensor by tensor, added up in float64, so that a model larger than memory averages and the order does not matter beyond
float32's last bit. The result is a run of one step that holds weights alone; it appears by one rename. Of adapters it
is the matrices with them merged that have a mean, because the mean of A times the mean of B is not that of their
products; the result has none.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from launcher import config as configuration
from launcher.conversion.export import WEIGHT, Weights
from launcher.conversion.memory import return_large_blocks
from launcher.conversion.step import write_step
from launcher.outcome import Outcome
from launcher.places import Checkpoint
from launcher.run_directory import RunDirectory
from launcher.runtime import in_ranks
from launcher.verbs.conversion import AverageJob
from launcher.work import Ranks
from model import lora
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError

logger = logging.getLogger(__name__)


def work(job: AverageJob) -> int:
    """Writes the run; returns the exit code."""
    return_large_blocks()
    return in_ranks(lambda ranks: _averaged(job, ranks), job.ranks)


def _averaged(job: AverageJob, ranks: Ranks) -> Outcome:
    paths = [checkpoint.path for checkpoint in job.checkpoints]
    stored = [_weights(checkpoint) for checkpoint in job.checkpoints]
    shapes = _shapes(paths, stored)
    last = max(job.checkpoints, key=lambda checkpoint: checkpoint.manifest.step)
    plain = last.config()
    renamed = replace(plain.run, name=job.output.name, dir=str(job.output))
    config = replace(plain, run=renamed, model=lora.without(plain.model))
    beside = job.output.with_name(f".{job.output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        run = RunDirectory(beside)
        write_step(
            run.checkpoints,
            last.manifest.step,
            {f"{WEIGHT}{name}": shape for name, shape in shapes.items()},
            lambda name: _mean(name.removeprefix(WEIGHT), stored, shapes),
            participants={"model": [f"{WEIGHT}{name}" for name in sorted(shapes)]},
            states={},
            config=config,
            layout={"averaged": [str(path) for path in paths]},
            attempt=ranks.attempt,
        )
        configuration.save(config, run.config)
        tokenizer = last.run.path / "tokenizer.json"
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, beside / "tokenizer.json")
        beside.rename(job.output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    merged = ", adapters merged" if any(each.merged for each in stored) else ""
    logger.info("%s: the mean of %d checkpoints, weights alone%s", job.output, len(paths), merged)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"averaged to {job.output}")


def _weights(checkpoint: Checkpoint) -> Weights:
    """What a checkpoint's model computes with."""
    found, model = Weights(StoredTensors(checkpoint.path)), checkpoint.config().model
    found.merged = None if model.lora.rank is None else model
    return found


def _shapes(paths: Sequence[Path], stored: Sequence[Weights]) -> dict[str, Tensor]:
    """Each weight on the meta device, in the widest dtype that a checkpoint has it in; all have the same names and
    shapes."""
    first, *others = (each.shapes for each in stored)
    for path, sizes in zip(paths[1:], others, strict=True):
        for name in sorted({*first, *sizes}):
            ours, theirs = first.get(name), sizes.get(name)
            if ours != theirs:
                said = ", ".join(
                    f"{place} has {'no such tensor' if size is None else tuple(size)}"
                    for place, size in ((paths[0], ours), (path, theirs))
                )
                raise UserError(f"only checkpoints of one model have a mean: of {name} {said}.")
    dtypes = {name: reduce(torch.promote_types, (each.dtype(name) for each in stored)) for name in first}
    return {name: torch.empty(size, dtype=dtypes[name], device="meta") for name, size in first.items()}


def _mean(name: str, stored: Sequence[Weights], shapes: Mapping[str, Tensor]) -> Tensor:
    total = stored[0].read(name).double()
    for each in stored[1:]:
        total += each.read(name)
    return total.div_(len(stored)).to(shapes[name].dtype)
