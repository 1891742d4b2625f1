"""The mean of several checkpoints' weights as a checkpoint of its own (Izmailov et al., 2018, arXiv:1803.05407).

Tensor by tensor, added up in float64, so that a model larger than memory averages and the order does not matter beyond
float32's last bit. The result is a run of one step that holds weights alone; it appears by one rename.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from launcher import config as configuration
from launcher.conversion.export import WEIGHT
from launcher.conversion.memory import return_large_blocks
from launcher.conversion.step import write_step
from launcher.outcome import Outcome
from launcher.run_directory import RunDirectory
from launcher.runtime import in_ranks
from launcher.verbs.conversion import AverageJob
from launcher.work import Ranks
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError

logger = logging.getLogger(__name__)


def work(job: AverageJob) -> int:
    """Writes the run; returns the exit code."""
    return_large_blocks()
    return in_ranks(lambda ranks: _averaged(job, ranks), job.ranks)


def _averaged(job: AverageJob, ranks: Ranks) -> Outcome:
    paths = [checkpoint.path for checkpoint in job.checkpoints]
    stored = [StoredTensors(path) for path in paths]
    shapes = _shapes(paths, stored)
    last = max(job.checkpoints, key=lambda checkpoint: checkpoint.manifest.step)
    plain = last.config()
    config = replace(plain, run=replace(plain.run, name=job.output.name, dir=str(job.output)))
    beside = job.output.with_name(f".{job.output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        run = RunDirectory(beside)
        write_step(
            run.checkpoints,
            last.manifest.step,
            shapes,
            lambda name: _mean(name, stored),
            participants={"model": sorted(shapes)},
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
    logger.info("%s: the mean of %d checkpoints, weights alone", job.output, len(paths))
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"averaged to {job.output}")


def _shapes(paths: Sequence[Path], stored: Sequence[StoredTensors]) -> dict[str, Tensor]:
    """Each weight on the meta device, in the dtype of the first checkpoint; all have the same names and shapes."""
    named = [{name: size for name, size in each.shapes.items() if name.startswith(WEIGHT)} for each in stored]
    for path, sizes in zip(paths[1:], named[1:], strict=True):
        for name in sorted({*named[0], *sizes}):
            ours, theirs = named[0].get(name), sizes.get(name)
            if ours != theirs:
                said = ", ".join(
                    f"{place} has {'no such tensor' if size is None else tuple(size)}"
                    for place, size in ((paths[0], ours), (path, theirs))
                )
                raise UserError(f"only checkpoints of one model have a mean: of {name.removeprefix(WEIGHT)} {said}.")
    return {name: torch.empty(size, dtype=stored[0].dtype(name), device="meta") for name, size in named[0].items()}


def _mean(name: str, stored: Sequence[StoredTensors]) -> Tensor:
    total = stored[0].read(name).double()
    for each in stored[1:]:
        total += each.read(name)
    return total.div_(len(stored)).to(stored[0].dtype(name))
