"""The rules of what is looked at while a run trains. Imports without torch."""

from collections.abc import Iterator
from pathlib import Path

from launcher.config import RunConfig
from launcher.evaluation.task import described
from launcher.plan.hardware import load
from model import families
from model.config import ObjectiveName
from parallel.common.errors import Problem, UserError

_CONTINUED = (ObjectiveName.causal_lm, ObjectiveName.answers)
"""Objectives whose models say what follows a text."""


def watching_problems(config: RunConfig, ranks: int) -> Iterator[Problem]:
    """Profiles, samples, tasks, and what the run is held against."""
    train = config.train
    start, stop = train.profile_start_step, train.profile_stop_step
    if stop is not None and (start is None or stop < start):
        legal = f"at least train.profile_start_step = {start}" if start else "null without train.profile_start_step"
        yield Problem(key="train.profile_stop_step", got=stop, legal=legal)
    if any(not 0 <= rank < ranks for rank in train.profile_ranks):
        yield Problem(key="train.profile_ranks", got=list(train.profile_ranks), legal=f"ranks from 0 to {ranks - 1}")
    if config.evaluate.prompts:
        yield from _samples(config)
    yield from _tasks(config)
    if config.tracking.hardware is not None:
        try:
            load(config.tracking.hardware)
        except UserError as error:
            legal = f"a name under configs/hardware or a file such as theirs ({str(error).rstrip('.')})"
            yield Problem(key="tracking.hardware", got=config.tracking.hardware, legal=legal)


def _tasks(config: RunConfig) -> Iterator[Problem]:
    tasks = config.evaluate.tasks
    named = [*tasks.files, *tasks.harness]
    if named and (tasks.every_steps or config.evaluate.every_steps) is None:
        legal = "a number of steps, or one in evaluate.every_steps, where evaluate.tasks names some"
        yield Problem(key="evaluate.tasks.every_steps", got=None, legal=legal)
    for file in tasks.files:
        try:
            named.append(described(Path(file)).name)
            named.remove(file)
        except UserError as error:
            legal = f"a YAML file that describes a task ({str(error).rstrip('.')})"
            yield Problem(key="evaluate.tasks.files", got=file, legal=legal)
    for name in sorted({name for name in named if named.count(name) > 1}):
        yield Problem(key="evaluate.tasks", got=name, legal="each task once, by a name of its own")
    if tasks.include is not None and not Path(tasks.include).is_dir():
        yield Problem(key="evaluate.tasks.include", got=tasks.include, legal="a directory with task files")


def _samples(config: RunConfig) -> Iterator[Problem]:
    layout, legal = config.parallel, None
    if layout.pipeline > 1 or layout.context > 1:
        legal = "none with a pipeline or context parallelism: `bloomery generate` continues texts from a checkpoint"
    elif families.objective(config.model, config.train.objective) not in _CONTINUED:
        legal = f"none without train.objective={' or '.join(_CONTINUED)}, whose models say what follows"
    elif config.evaluate.every_steps is None:
        legal = "none without evaluate.every_steps, for it is then that they are continued"
    if legal is not None:
        yield Problem(key="evaluate.prompts", got=list(config.evaluate.prompts), legal=legal)
