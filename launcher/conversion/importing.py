"""Another program's model as step 0 of a run, in the format that every layout loads.

Tensors are read, joined and written one at a time, so that a model larger than memory converts; moments move as their
weights do. No file's content is run. The run appears by one rename, after the logits were compared.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.examples import kinds as examples
from launcher import config as configuration
from launcher.config import RunConfig
from launcher.conversion.check import compare_logits, missing_transformers
from launcher.conversion.hugging_face import open_deepspeed, open_hugging_face
from launcher.conversion.megatron import open_megatron
from launcher.conversion.memory import return_large_blocks
from launcher.conversion.sources import Foreign
from launcher.conversion.step import write_step
from launcher.outcome import Outcome
from launcher.run_directory import RunDirectory
from launcher.runtime import in_ranks
from launcher.verbs.conversion import ImportFormat, ImportJob
from launcher.work import Ranks
from model.config import Classified, ModelConfig
from model.hf.pairs import Pair, filled_up
from model.size import parameter_count
from parallel.common.errors import UserError
from parallel.common.units import format_count
from parallel.config import LoadParts
from parallel.loss_scale import LossScale
from parallel.updater import Kind

_CHECKED_LENGTH = 32

logger = logging.getLogger(__name__)


def work(job: ImportJob) -> int:
    """Writes the run; returns the exit code."""
    return_large_blocks()
    return in_ranks(lambda ranks: _imported(job, ranks), job.ranks)


def _imported(job: ImportJob, ranks: Ranks) -> Outcome:
    foreign = _opened(job)
    model, source = foreign.model, foreign.source
    if job.check and foreign.reference is not None:
        missing_transformers()
    kinds = (Kind.weight,) if job.parts is LoadParts.weights else source.kinds
    config = _run_config(job, model)
    beside = job.output.with_name(f".{job.output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        run = RunDirectory(beside)
        _write_step(run.checkpoints, config, foreign, kinds, job, ranks.attempt)
        configuration.save(config, run.config)
        configuration.save_section(config, "model", beside / "model.yaml")
        if foreign.tokenizer is not None:
            foreign.tokenizer.save(beside / "tokenizer.json")
        if foreign.labels:
            _facts(foreign).write(beside)
        if job.check and foreign.reference is not None:
            weights = {pair.ours: _joined(pair, foreign, Kind.weight) for pair in foreign.pairs}
            compare_logits(model, weights, foreign.reference(), sequence_length=config.train.sequence_length)
        beside.rename(job.output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    assert model.vocabulary_size is not None
    count = format_count(parameter_count(model, model.vocabulary_size, config.train.sequence_length))
    held = "weights" if len(kinds) == 1 else f"weights, and moments after {source.steps} steps"
    logger.info("%s: a %s of %s parameters, step 0 of a run: %s", job.output, model.family, count, held)
    logger.info("go on from it: bloomery train %s/model.yaml CONFIG checkpoint.load=%s", job.output, job.output)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"imported to {job.output}")


def model_name(source: Path) -> str:
    """What `transformers` loads: the name of a model whose files stand in the hub's cache, else the directory."""
    names = [part for part in source.absolute().parts if part.startswith("models--")]
    return names[-1].removeprefix("models--").replace("--", "/") if names else str(source.resolve())


def _opened(job: ImportJob) -> Foreign:
    if job.format is ImportFormat.deepspeed:
        assert job.config is not None
        return open_deepspeed(job.source, job.config)
    if job.format is ImportFormat.megatron:
        return open_megatron(job.source, moments=job.parts is not LoadParts.weights)
    return open_hugging_face(job.source)


def _run_config(job: ImportJob, model: ModelConfig) -> RunConfig:
    plain = RunConfig()
    length = model.positions or _CHECKED_LENGTH
    return replace(
        plain,
        run=replace(plain.run, name=job.output.name, dir=str(job.output)),
        model=model,
        train=replace(plain.train, steps=1, global_batch_size=1, sequence_length=length),
    )


def _facts(foreign: Foreign) -> examples.Facts:
    """The names of the classes, as a store of examples has them."""
    texts = foreign.model.classes.of is Classified.texts
    kind = examples.Kind.text_classes if texts else examples.Kind.token_classes
    return examples.Facts(kind=kind, labels=foreign.labels)


def _joined(pair: Pair, foreign: Foreign, kind: Kind) -> Tensor:
    found = pair.join([foreign.source.read(part, kind) for part in pair.theirs])
    return filled_up(found, pair.filling) if kind is Kind.weight else found


def _shapes(foreign: Foreign) -> Iterator[tuple[Pair, Tensor]]:
    """What each tensor of ours will be, from what the source says of shapes alone."""
    for pair in foreign.pairs:
        parts = [torch.empty(tuple(foreign.source.shape(part)), device="meta") for part in pair.theirs]
        try:
            yield pair, pair.join(parts)
        except RuntimeError as error:
            raise UserError(
                f"the tensors {', '.join(pair.theirs)} have shapes that do not fit the model's description: {error}."
            ) from None


def _write_step(
    checkpoints: Path, config: RunConfig, foreign: Foreign, kinds: tuple[Kind, ...], origin: ImportJob, attempt: str
) -> None:
    """Step 0, with moments where they are taken over."""
    shapes = list(_shapes(foreign))
    places = {f"{kind.value}.{pair.ours}": (pair, kind) for kind in kinds for pair, _ in shapes}
    participants: dict[str, list[str] | None] = {"model": _keys(places, Kind.weight)}
    states: dict[str, Any] = {}
    if len(kinds) > 1:
        participants["optimizer"] = _keys(places, Kind.first_moment, Kind.second_moment)
        participants["schedule"] = None
        states["schedule"] = _schedule(foreign)
    write_step(
        checkpoints,
        0,
        {f"{kind.value}.{pair.ours}": shape for kind in kinds for pair, shape in shapes},
        lambda name: _joined(places[name][0], foreign, places[name][1]).contiguous(),
        participants=participants,
        states=states,
        config=config,
        layout={"imported": config.model.family, "format": origin.format, "from": model_name(origin.source)},
        attempt=attempt,
    )


def _keys(places: dict[str, tuple[Pair, Kind]], *kinds: Kind) -> list[str]:
    return sorted(name for name, (_, kind) in places.items() if kind in kinds)


def _schedule(foreign: Foreign) -> dict[str, Any]:
    """The schedule at its beginning, over moments that stand for steps which this run has not taken."""
    if foreign.source.steps is None:
        raise UserError("the checkpoint does not say how many steps its moments stand for: import --parts weights.")
    loss_scale = LossScale(dynamic=False)
    loss_scale.steps_not_taken = -foreign.source.steps
    return {"steps_taken": 0, "loss_scale": loss_scale.state_dict()}
