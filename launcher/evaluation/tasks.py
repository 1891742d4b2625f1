"""`bloomery evaluate CHECKPOINT --task FILE`, and `--harness NAME`: figures, kept in the run and told to its tracker.

They stand in `tasks.jsonl`, which the report shows, and in `events.jsonl`. Weights & Biases is a copy of that: the
training tells it what it finds there; where none is running, it is told from here. TensorBoard is told from here too.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.store import Store
from launcher.assemble import make_engine
from launcher.config import WandbMode
from launcher.conversion.in_memory import in_memory
from launcher.evaluation.asking import Asked
from launcher.evaluation.task_set import TaskSet
from launcher.objective import objective_of
from launcher.outcome import Outcome
from launcher.run_directory import TASK, Lock
from launcher.runtime import in_ranks
from launcher.tensorboard import TensorBoard
from launcher.tracking import Tracker
from launcher.verbs.evaluate import TaskJob
from launcher.weights_and_biases import WeightsAndBiases
from launcher.work import Ranks
from parallel.checkpoint.load import load
from parallel.common.files import hash_file, write_json
from parallel.engine import Engine
from parallel.topology import Topology


def work(job: TaskJob) -> int:
    """Joins the ranks, asks, writes; returns the exit code."""
    return in_ranks(lambda ranks: _asked(job, ranks), job.ranks)


def _asked(job: TaskJob, ranks: Ranks) -> Outcome:
    asked = Asked(
        job.config,
        job.checkpoint.run.path,
        rank=ranks.rank,
        engine=partial(_loaded, job),
        model=lambda: None if ranks.rank else in_memory(job.checkpoint),
    )
    found = TaskSet(job.questions, job.config).figures(asked)
    if ranks.rank == 0:
        keep(job, found)
        tell(job, found)
        show(job.checkpoint.path.name, found)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"{len(found)} tasks")


def _loaded(job: TaskJob) -> Engine:
    """The checkpoint's model in the layout of the job."""
    config, topology = job.config, Topology.create(job.config.parallel)
    rows = config.model.vocabulary_size or Store.open(Path(config.data.store)).vocabulary_size
    engine = make_engine(config, vocabulary_size=rows, topology=topology, objective=objective_of(config))
    load(job.checkpoint.path, {"model": engine.participants()["model"]})
    return engine


def keep(job: TaskJob, found: dict[str, dict[str, Any]]) -> None:
    """A line a task in the run, and all of them in `--json`."""
    identity = {
        "checkpoint": job.checkpoint.path.name,
        "checksum": hash_file(job.checkpoint.path / "manifest.json"),
        "step": job.checkpoint.manifest.step,
    }
    run = job.checkpoint.run
    known = {"time": time.time(), "event": TASK, "attempt": "", "step": identity["step"]}
    for name, figures in found.items():
        run.tasks.append({**identity, "task": name, **figures})
        run.events.append({**known, "task": name, "figures": figures})
    if job.copy is not None:
        write_json(job.copy, {**identity, "tasks": found})


def tell(job: TaskJob, found: dict[str, dict[str, Any]]) -> None:
    """Draws them in TensorBoard where the run has one; connects a run that was trained here and is not being trained to
    Weights & Biases, and tells its events."""
    run, config = job.checkpoint.run, job.checkpoint.config()
    if config.tracking.tensorboard:
        board = TensorBoard(run.tensorboard / "evaluate")
        board.figures(job.checkpoint.manifest.step, found)
        board.close(0)
    trained = run.metrics.path.is_file() and not Lock.held(run.lock)
    if trained and config.tracking.wandb.mode is not WandbMode.disabled:
        Tracker(metrics=None, events=run.events.path, sinks=[WeightsAndBiases.of(config, run.path)]).close(0)


def show(checkpoint: str, found: dict[str, dict[str, Any]]) -> None:
    """Prints a table."""
    table = Table(title=f"Tasks, {checkpoint}", title_justify="left")
    for head in ("task", "figure", "value"):
        table.add_column(head, justify="right" if head == "value" else "left")
    for name, figures in found.items():
        for figure, value in figures.items():
            if isinstance(value, float):
                table.add_row(name, figure, f"{value:.4f}")
    Console().print(table)
