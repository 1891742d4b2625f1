"""Where an attempt begins: after the run's own newest checkpoint, from another run's, or at nothing.

Contract: random weights are for a run that has saved nothing and asked for no checkpoint. Where a checkpoint is there
or was asked for, it is loaded or the attempt ends with a sentence that says why.
"""

from pathlib import Path

import torch.distributed as dist

from data_pipeline.examples.kinds import Facts
from launcher.assemble import Parts
from launcher.config import RunConfig
from launcher.places import find_step
from model.families import before_classes, begins_anew
from parallel.checkpoint.agreement import agreed, exchange
from parallel.checkpoint.manifest import Manifest
from parallel.common.errors import UserError
from parallel.config import LoadParts
from parallel.updater import Kind

_PARTS = {LoadParts.weights: ("model",), LoadParts.weights_and_moments: ("model", "optimizer", "schedule")}


def begin(parts: Parts, config: RunConfig) -> Path | None:
    """Gives the parts their states; returns the step directory they are from. Every rank calls this.

    Raises:
        UserError: on all ranks; a checkpoint is damaged, does not fit, does not exist, or leaves no step to take.
    """
    origin = parts.checkpoints.resume(parts.participants, fallback=config.checkpoint.fallback)
    done, total = parts.progress.step, parts.progress.total_steps
    if origin is not None:
        if done > total:
            raise UserError(f"{origin} is after step {done}, and the run has only {total}: restore train.steps.")
        return origin
    if config.checkpoint.load is None:
        return None
    origin = _found(config.checkpoint.load)
    names = _PARTS.get(config.checkpoint.load_parts, tuple(parts.participants))
    with agreed(f"load the checkpoint {origin}"):
        if config.model.classes.number:
            _check_classes(origin, config)
        if "optimizer" in names:
            _check_optimizer(origin, config.optimizer.name)
    anew = config.checkpoint.load_parts is LoadParts.weights
    parts.checkpoints.load(
        origin,
        {name: parts.participants[name] for name in names},
        may_differ=lambda name: anew and begins_anew(config.model, name.removeprefix(f"{Kind.weight}.")),
        stands_for=before_classes if anew else str,
    )
    if config.checkpoint.load_parts is LoadParts.weights_and_moments:
        parts.engine.restart_schedule()
    if parts.progress.done:
        raise UserError(
            f"{origin} is after step {parts.progress.step}, and the run has {total}: give it more steps "
            "(train.steps), or take the weights alone (checkpoint.load_parts=weights)."
        )
    return origin


def _check_classes(origin: Path, config: RunConfig) -> None:
    """A head whose rows stand for the same classes in another order would be taught the wrong ones."""
    places = (Path(Manifest.read(origin).config["data"]["store"]), origin.parent.parent)
    found = next(((place, facts) for place in places if (facts := Facts.read(place)) is not None), None)
    ours = Facts.read(Path(config.data.store))
    if found is None or ours is None:
        return
    place, theirs = found
    if theirs.labels != ours.labels and sorted(theirs.labels) == sorted(ours.labels):
        raise UserError(
            f"{origin} numbers its classes {', '.join(theirs.labels)}, and {config.data.store} numbers them "
            f"{', '.join(ours.labels)}: make the store again with `bloomery data examples ... --tokenizer {place}`, "
            "which keeps their order."
        )


def _check_optimizer(origin: Path, name: str) -> None:
    """Another optimizer's state is of no use to this one."""
    before = Manifest.read(origin).config.get("optimizer", {}).get("name", "adamw")
    if before != name:
        raise UserError(
            f"{origin} holds the state of the optimizer {before}, and optimizer.name is {name}: set it to {before}, or "
            "take the weights alone (checkpoint.load_parts=weights)."
        )


def _found(checkpoint: str) -> Path:
    """The step directory that rank 0 finds: another run may be saving at this moment."""
    found = None
    with agreed(f"find {checkpoint}"):
        if dist.get_rank() == 0:
            found = find_step(checkpoint)
    path = exchange(found)[0]
    assert path is not None
    return path
