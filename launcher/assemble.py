"""Configuration to objects: the table of contents of a run.

    config -> topology -> model -> data -> loop -> checkpoints -> tracking

Read it from top to bottom to know what a run is made of; each line names the room where its part lives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from data_pipeline.following import open_store
from data_pipeline.loader import Loader
from data_pipeline.store import TRAINING, Store
from launcher import config as configuration
from launcher.anomaly.judge import Judge
from launcher.anomaly.replicas import Replicas
from launcher.batches import Batches
from launcher.blame import node_name
from launcher.config import RunConfig, WandbMode
from launcher.display import Display, make_display
from launcher.evaluation.looks import Looks
from launcher.evaluation.samples import Samples
from launcher.evaluation.training_tasks import TrainingTasks, interval
from launcher.evaluation.validation import Validation
from launcher.length import batch_sizes, total_steps
from launcher.machine import known_machine
from launcher.meter import Meter
from launcher.objective import objective_of, plan_of, travelling_length
from launcher.prediction import Prediction, predicted, process_bytes
from launcher.preempt import Asked, Preempt
from launcher.profiling import Profile, StepProfile
from launcher.progress import Every, Progress
from launcher.run_directory import Lock, RunDirectory
from launcher.runtime import COLLECTIVE_LIMIT
from launcher.saving import Saving
from launcher.tensorboard import TensorBoard
from launcher.tracking import Shown, Sink, Tracker
from launcher.watchdog.pulse import Pulse
from launcher.watchdog.stragglers import Stragglers
from launcher.weights_and_biases import WeightsAndBiases
from model.build import build
from model.objectives import takes_losses
from parallel.checkpoint.agreement import exchange
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.patience import Patience
from parallel.checkpoint.retention import Retention
from parallel.common.lines import JsonLines
from parallel.common.stateful import Stateful
from parallel.config import Logits, Precision
from parallel.engine import Engine, Objective
from parallel.precision import model_dtype, on_this_machine
from parallel.rules import check_patterns
from parallel.schedules import Schedule
from parallel.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Everything that the training loop works with."""

    topology: Topology
    hosts: list[str]
    """Where each rank runs."""
    vocabulary_size: int
    engine: Engine
    loader: Loader
    batches: Batches
    progress: Progress
    preempt: Preempt
    judge: Judge
    looks: Looks
    logging: Every
    saving: Saving
    checkpoints: Checkpoints
    participants: dict[str, Stateful]
    meter: Meter
    profile: Profile
    display: Display
    tracker: Tracker


def assemble(
    config: RunConfig,
    directory: RunDirectory,
    *,
    attempt: str,
    preempt: Preempt,
    pulse: Pulse,
    event: Callable[..., None],
) -> Parts:
    """Builds the run on this rank; every rank calls this, `torch.distributed` is initialised."""
    train, steps = config.train, total_steps(config)
    store = open_store(config.data)
    topology = Topology.create(config.parallel)
    looks = _looks(config, store, topology, directory, event)
    rows = vocabulary_size(config, store)
    held_before = process_bytes(topology.device)
    engine = make_engine(
        config, vocabulary_size=rows, topology=topology, objective=objective_of(config, sources=store.sources)
    )
    expected = predicted(config, engine, vocabulary_size=rows, steps=steps)
    sinks = [Prediction(expected, held_before=held_before, file=directory.prediction)] if expected else []
    _check_patterns(config, engine)
    loader = _loader(config, store, topology)
    progress = Progress(total_steps=steps, batch_sizes=batch_sizes(config), sequence_length=train.sequence_length)
    fence = Fence(attempt=attempt, holder=partial(Lock.attempt, directory.lock))
    patience = Patience(config.checkpoint.failures, lambda why: event("not_saved", step=progress.step, why=why))
    checkpoints = _checkpoints(config, directory, topology, fence, patience)
    display = make_display(topology.rank)
    saving = Saving(config.checkpoint, total_steps=steps, rank=topology.rank)
    hosts = exchange(node_name())
    several = _hosts() if topology.world_size > 1 else None
    logging = Every(train.log_every_steps, config.evaluate.every_steps, interval(config), besides=(1, steps))
    judge = _judge(config, engine, loader, progress, event, due=logging.due)
    engine.pulse, engine.refuses, engine.before_update = pulse, judge.refuses, checkpoints.copied
    watching = {"progress": progress, "hosts": hosts, "event": event}
    preempt.join(several, [saving, checkpoints, judge, *_watchers(config, engine, several, **watching)], pulse=pulse)
    return Parts(
        topology=topology,
        hosts=hosts,
        vocabulary_size=rows,
        engine=engine,
        loader=loader,
        batches=Batches(loader, topology),
        progress=progress,
        preempt=preempt,
        judge=judge,
        looks=looks,
        logging=logging,
        saving=saving,
        checkpoints=checkpoints,
        participants={**engine.participants(), "loader": loader, "progress": progress, "judge": judge},
        meter=_meter(config, rows, engine, pulse, loader),
        profile=_profile(config, directory, topology),
        display=display,
        tracker=_tracker(config, directory, fence, display, rank=topology.rank, sinks=sinks),
    )


def _checkpoints(
    config: RunConfig, directory: RunDirectory, topology: Topology, fence: Fence, patience: Patience
) -> Checkpoints:
    """What this attempt saves, which nothing but it may write."""
    return Checkpoints(
        directory.checkpoints,
        retention=Retention.of(config.checkpoint),
        fence=fence,
        layout=dict(topology.describe()),
        config=configuration.to_dict(config),
        group=_hosts(),
        asynchronous=config.checkpoint.asynchronous,
        mirror=config.checkpoint.mirror,
        patience=patience,
    )


def _judge(
    config: RunConfig,
    engine: Engine,
    loader: Loader,
    progress: Progress,
    event: Callable[..., None],
    *,
    due: Callable[[int], bool],
) -> Judge:
    return Judge(
        config.anomaly,
        progress=progress,
        position=lambda: loader.position,
        several=engine.topology.world_size > 1,
        due=due,
        refused=engine.updater.loss_scale.refused,
        event=event,
    )


def _check_patterns(config: RunConfig, engine: Engine) -> None:
    """Refuses patterns of the optimizer that fit no parameter on any rank; every rank calls this."""
    if config.optimizer.groups or config.optimizer.frozen:
        names = exchange([local.name for local in (*engine.parameters, *engine.frozen)])
        check_patterns(sorted({name for each in names for name in each}), config.optimizer)


def _meter(config: RunConfig, rows: int, engine: Engine, pulse: Pulse, loader: Loader) -> Meter:
    return Meter(
        model=config.model,
        vocabulary_size=rows,
        sequence_length=config.train.sequence_length,
        decoder_length=travelling_length(config) - config.train.sequence_length,
        topology=engine.topology,
        peak_flops=_peak_flops(config, engine.topology),
        pulse=pulse,
        ledger=lambda: loader.ledger,
        skipped=lambda: engine.updater.loss_scale.steps_not_taken,
    )


def _peak_flops(config: RunConfig, topology: Topology) -> float | None:
    """Of one device at the run's precision, where its machine is known."""
    machine = known_machine(config, topology.device)
    return None if machine is None else machine.peak_flops.get(on_this_machine(config.precision).value)


def _looks(
    config: RunConfig, store: Store, topology: Topology, directory: RunDirectory, event: Callable[..., None]
) -> Looks:
    """What is looked at while it trains."""
    steps = total_steps(config)
    return Looks(
        [
            Validation(config, store=store, topology=topology, total_steps=steps),
            Samples(config, store=store, directory=directory, total_steps=steps, event=event),
            TrainingTasks(config, directory=directory, total_steps=steps, event=event),
        ]
    )


def _profile(config: RunConfig, directory: RunDirectory, topology: Topology) -> Profile:
    """Of the steps that are asked for, on the ranks that are asked for."""
    start, stop = config.train.profile_start_step, config.train.profile_stop_step
    if start is None or topology.rank not in config.train.profile_ranks:
        return Profile()
    last = start if stop is None else stop
    return StepProfile(directory.profile, start=start, stop=last, rank=topology.rank, device=topology.device)


def _loader(config: RunConfig, store: Store, topology: Topology) -> Loader:
    """Training batches of this rank."""
    train = config.train
    return Loader(
        store,
        split=TRAINING,
        mixture=config.data.weights,
        sequence_length=train.sequence_length,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        dp_rank=topology.data_parallel_rank,
        dp_size=topology.data_parallel_size,
        seed=config.run.seed,
        mask_documents=config.data.mask_documents,
        plan=plan_of(config),
    )


def _watchers(config: RunConfig, engine: Engine, several: ProcessGroup | None, **watching: Any) -> list[Asked]:
    """What ranks look at together after a step; a rank alone has nobody to compare with."""
    if several is None:
        return []
    return [
        Replicas(config.anomaly, engine=engine, group=several, **watching),
        Stragglers(config.watchdog, group=several, **watching),
    ]


def make_engine(
    config: RunConfig,
    *,
    vocabulary_size: int,
    topology: Topology,
    objective: Objective,
    dtype: torch.dtype | None = None,
) -> Engine:
    """The model with its optimizer, initialised from the seed; of the configured precision, unless `dtype` is given."""
    dtype = dtype or model_dtype(config.precision)
    chunks = build(
        config.model,
        vocabulary_size=vocabulary_size,
        sequence_length=config.train.sequence_length,
        dtype=dtype,
        topology=topology,
        seed=config.run.seed,
        in_eight_bits=config.precision is Precision.fp8 and dtype == model_dtype(config.precision),
    )
    if config.parallel.logits is Logits.chunked and takes_losses(objective):
        for chunk in chunks:
            chunk.predict_in_chunks(z_loss=config.train.z_loss)
    return Engine(
        chunks,
        objective=objective,
        topology=topology,
        optimizer=config.optimizer,
        schedule=Schedule(config.optimizer, total_steps(config)),
        micro_batch_size=config.train.micro_batch_size,
        sequence_length=travelling_length(config),
    )


def vocabulary_size(config: RunConfig, store: Store) -> int:
    """Rows of the embedding: the store's vocabulary unless the model says otherwise."""
    return config.model.vocabulary_size or store.vocabulary_size


def _hosts() -> ProcessGroup:
    """All ranks over gloo, for what the hosts agree on without waiting for a device; a new group each time."""
    group = dist.new_group(backend="gloo", timeout=COLLECTIVE_LIMIT)
    assert isinstance(group, ProcessGroup)  # every rank is a member
    return group


def _tracker(
    config: RunConfig, directory: RunDirectory, fence: Fence, display: Display, *, rank: int, sinks: Sequence[Sink]
) -> Tracker:
    """Metrics are this attempt's alone: one that is over would write steps into the run that stand there already."""
    if rank != 0:
        return Tracker(metrics=None, events=None)
    sinks = [Shown(display), *sinks]
    if config.tracking.wandb.mode is not WandbMode.disabled:
        sinks.append(WeightsAndBiases.of(config, directory.path))
    if config.tracking.tensorboard:
        sinks.append(TensorBoard(directory.tensorboard))
    metrics = JsonLines(directory.metrics.path, check=partial(fence.check, "write down a step"))
    return Tracker(metrics=metrics, events=directory.events.path, sinks=sinks)
