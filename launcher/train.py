"""The loop: one page that names what happens in a step, and nothing about which feature is on.

A run goes on by itself: the same directory resumes from its newest whole checkpoint, and on the same layout every later
loss has the same bits as if nothing had happened. That works because nothing random is stored: the order of samples is
a function of (seed, position), initial values of (seed, name), and a checkpoint keeps positions, weights and moments.
"""

import logging
import signal
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from launcher import changes, deterministic
from launcher.anomaly.judge import RollBack
from launcher.anomaly.rollback import roll_back
from launcher.assemble import Parts, assemble
from launcher.config import RunConfig
from launcher.debugging import debugged
from launcher.doctor.job import preflight
from launcher.meter import finite
from launcher.outcome import Outcome
from launcher.preempt import Preempt
from launcher.resume import begin
from launcher.run_directory import Lock, Records, RunDirectory
from launcher.runtime import in_ranks
from launcher.verbs.train import TrainJob
from launcher.watchdog.pulse import Pulse, watched
from launcher.work import Ranks
from model.size import parameter_count
from parallel.checkpoint.agreement import agreed
from parallel.checkpoint.fence import claim
from parallel.common.units import format_count
from parallel.engine import StepResult
from parallel.frozen import elements

_DEGREES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "data")
REQUEUE = 75
INTERRUPTED = 130

logger = logging.getLogger(__name__)


def train(parts: Parts, records: Records) -> None:
    """Takes the steps that remain, or those until the ranks agree to stop; goes back where they agree on that."""
    while True:
        try:
            return take_steps(parts, records)
        except RollBack as asked:
            roll_back(parts, records, asked)


def take_steps(parts: Parts, records: Records) -> None:
    """The loop."""
    parts.meter.begin(parts.progress)
    for step in parts.profile.watched(parts.progress.remaining()):
        batch = parts.meter.timed("data", parts.batches.next)
        result = parts.engine.step(batch)
        stop = parts.preempt.agreed()
        parts.progress.advance()
        parts.display.advance()
        parts.meter.add(result)
        if parts.logging.due(step):
            record = parts.meter.summarise(parts.progress, batch, result)
            if parts.looks.due(step):
                record |= parts.meter.timed("evaluate", parts.looks.take, parts.engine, step)
            parts.tracker.log(parts.progress, record)
        if parts.saving.due(step) or stop:
            parts.meter.timed("save", save, parts, result, records)
        if stop:
            break
    parts.checkpoints.finish(mirror=parts.progress.done)


def save(parts: Parts, result: StepResult, records: Records) -> None:
    """Writes a checkpoint of this step, once it is judged: one that went wrong is not saved."""
    parts.judge.settle()
    step = parts.progress.step
    loss, _ = finite(result)
    parts.checkpoints.save(
        step,
        parts.participants,
        metrics={**({} if loss is None else {"loss": loss}), **parts.looks.at(step)},
        committed=partial(records.saved, step=step),
    )
    parts.saving.saved()


def work(job: TrainJob) -> int:
    """Joins the ranks, takes the run's lock, trains; returns the exit code."""
    deterministic.apply(deterministic=job.config.train.deterministic)
    directory = RunDirectory(job.directory)
    lock = Lock(directory.lock)
    preempt = Preempt()
    watching = watched(job.watchdog, directory.path, job.ranks)
    with preempt.listening(), closing(lock), watching as pulse:
        return in_ranks(
            lambda ranks: _attempt(job, directory, lock, ranks, preempt, pulse),
            job.ranks,
            outcome=lambda attempt: directory.outcome if Lock.attempt(directory.lock) == attempt else None,
        )


def _attempt(
    job: TrainJob, directory: RunDirectory, lock: Lock, ranks: Ranks, preempt: Preempt, pulse: Pulse
) -> Outcome:
    pulse.met(ranks.attempt)
    with agreed(f"start {directory.path}"):
        if ranks.rank == 0:
            lock.take(ranks.attempt)
            changes.check(directory, job.config)
            directory.check_not_lost()
            claim(directory.checkpoints, ranks.attempt)
    records = Records(directory, attempt=ranks.attempt, writes=ranks.rank == 0)
    if job.config.watchdog.preflight:
        preflight(ranks, event=records.event)
    parts = assemble(job.config, directory, attempt=ranks.attempt, preempt=preempt, pulse=pulse, event=records.event)
    origin = begin(parts, job.config)
    pulse.follow(parts.progress)
    changed = changes.since_last_attempt(directory, job.config)
    changes.show(changed, directory, job.config)
    records.begin(
        job.config,
        layout=parts.topology.describe(),
        step=parts.progress.step,
        origin=origin,
        changes=changed,
        versions=changes.versions(),
        hosts=parts.hosts,
        code=changes.code_files(tuple(job.config.plugins)),
    )
    _introduce(job.config, parts, origin)
    shown = parts.display.shown(step=parts.progress.step, total_steps=parts.progress.total_steps)
    debugging = debugged(ranks.rank, wanted=job.debug_rank)
    with closing(parts.checkpoints), parts.tracker.told(), shown, debugging:
        train(parts, records)
    outcome = _ended(job, parts, ranks.attempt)
    records.event("finished" if outcome.exit_code == 0 else "stopped", step=parts.progress.step)
    parts.tracker.close(outcome.exit_code)
    logger.info("%s", outcome.message)
    return outcome


def _introduce(config: RunConfig, parts: Parts, origin: Path | None) -> None:
    vocabulary, topology = parts.vocabulary_size, parts.topology
    count = format_count(parameter_count(config.model, vocabulary))
    logger.info("model: %s parameters, a vocabulary of %s", count, f"{vocabulary:,}")
    if config.optimizer.frozen or config.model.lora.rank is not None:
        trained, frozen = (elements(local) for local in (parts.engine.parameters, parts.engine.frozen))
        share = trained / (trained + frozen)
        logger.info("trained: %s of them (%.2g %%); the others stay as they are", format_count(trained), 100 * share)
    logger.info("layout: %s", described(topology.describe(), topology.device.type))
    if origin is not None:
        going_on = f"going on after step {parts.progress.step}" if parts.progress.step else "starting from the weights"
        logger.info("%s of %s", going_on, origin)


def described(layout: Mapping[str, Any], device: str) -> str:
    """`4 ranks on cpu: tensor 2, data 2, ZeRO stage 1`; degrees of 1 are left out."""
    degrees = [f"{name} {layout[name]}" for name in _DEGREES if layout[name] > 1]
    ranks = f"{layout['world_size']} rank{'s' if layout['world_size'] > 1 else ''} on {device}"
    return f"{ranks}: {', '.join([*degrees, f'ZeRO stage {layout["zero_stage"]}'])}"


def _ended(job: TrainJob, parts: Parts, attempt: str) -> Outcome:
    progress, directory = parts.progress, job.directory
    if progress.done:
        code, message = 0, f"finished: {progress.step} steps, {format_count(progress.tokens)} tokens, in {directory}"
    else:
        asked = parts.preempt.signal
        code = INTERRUPTED if asked is signal.SIGINT else REQUEUE
        cause = asked.name if asked is not None else "a signal"
        message = f"stopped by {cause} after step {progress.step}, which is saved; the same command goes on from there"
    return Outcome(attempt=attempt, exit_code=code, message=message, step=progress.step)
