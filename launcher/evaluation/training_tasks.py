"""Tasks that a run asks its own model while it trains: those of `bloomery evaluate`, with the same figures.

The live model answers in whatever layout it trains in. Texts are written, and gaps filled, by `transformers` on the
first rank, from the masters gathered there as float32: a copy of the model in its memory for so long, while the others
wait. What libraries draw, and the seeds that they set, leave the run's own random states as they were.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config import RunConfig
from launcher.conversion.export import Weights
from launcher.conversion.in_memory import evaluated
from launcher.evaluation.asking import Asked
from launcher.evaluation.task import HarnessTasks, Questions, read_task
from launcher.evaluation.task_set import TaskSet
from launcher.progress import Every
from launcher.run_directory import TASK, RunDirectory
from parallel.checkpoint.agreement import agreed
from parallel.checkpoint.manifest import step_name
from parallel.common.errors import UserError
from parallel.engine import Engine
from parallel.gathering import gathered


class TrainingTasks:
    """The tasks of `evaluate.tasks`."""

    def __init__(
        self, config: RunConfig, *, directory: RunDirectory, total_steps: int, event: Callable[..., None]
    ) -> None:
        """Reads them, and puts them to nobody first; every rank calls this.

        Raises:
            UserError: on all ranks, what is wrong with a task.
        """
        tasks = config.evaluate.tasks
        every = interval(config)
        self._schedule = Every(every, besides=() if every is None else (total_steps,))
        self._config = config
        self._directory = directory
        self._event = event
        self._set: TaskSet | None = None
        if every is None:
            return
        harness = HarnessTasks(
            names=tuple(tasks.harness),
            include=None if tasks.include is None else Path(tasks.include),
            few_shot=tasks.few_shot,
            limit=tasks.limit,
        )
        with agreed("read evaluate.tasks"), same_random_states():
            try:
                questions = Questions(tasks=tuple(read_task(Path(file)) for file in tasks.files), harness=harness)
                self._set = TaskSet(questions, config)
                self._set.rehearse(directory.path)
            except UserError as error:
                raise UserError(f"evaluate.tasks: {error}") from error

    def due(self, step: int) -> bool:
        """Whether to ask after this step."""
        return self._schedule.due(step)

    def take(self, engine: Engine, step: int) -> dict[str, Any]:
        """`{"tasks": {"NAME.FIGURE": number}}`; the first rank keeps them as `bloomery evaluate` does. All ranks call
        this together."""
        assert self._set is not None
        rank = engine.topology.rank
        asked = Asked(
            self._config,
            self._directory.path,
            rank=rank,
            engine=lambda: engine,
            model=lambda: self._live(engine),
            alive=partial(_alive, engine),
        )
        with same_random_states():
            found = self._set.figures(asked)
        found = {name: {key: _number(value) for key, value in figures.items()} for name, figures in found.items()}
        for name, figures in found.items():
            self._event(TASK, step=step, task=name, figures=figures)
            if rank == 0:
                self._directory.tasks.append({"checkpoint": step_name(step), "step": step, "task": name, **figures})
        numbers = {
            f"{name}.{key}": value
            for name, figures in found.items()
            for key, value in figures.items()
            if not isinstance(value, int | str)
        }
        return {"tasks": numbers}

    def _live(self, engine: Engine) -> Any:
        """The model in `transformers` with the weights of this moment, on the first rank."""
        weights: dict[str, Any] = engine.participants()["model"].state_dict()
        tensors = gathered(weights.values(), engine.topology.device)
        if engine.topology.rank:
            return None
        return evaluated(self._config, Weights(_Gathered(tensors)), place=self._directory.path)


def _alive(engine: Engine) -> None:
    engine.pulse("evaluate")
    dist.barrier()


class _Gathered:
    """Tensors in memory as a checkpoint's."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def interval(config: RunConfig) -> int | None:
    """Steps between two times; None where no task is named."""
    tasks = config.evaluate.tasks
    return (tasks.every_steps or config.evaluate.every_steps) if tasks.files or tasks.harness else None


@contextmanager
def same_random_states() -> Iterator[None]:
    """What the block draws is not drawn from what the process goes on with: a library seeds everything it can reach."""
    ours, arrays = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(arrays)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
