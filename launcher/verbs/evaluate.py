"""`bloomery evaluate`: finds the checkpoint, shows an evaluation that stands already, else starts the ranks.

The quick half: it imports no torch. `launcher.evaluation.bits_per_byte` computes.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.store import VALIDATION, Store
from launcher.config import EvaluateConfig, RunConfig
from launcher.evaluation import result
from launcher.evaluation.task import HarnessTasks, Questions, read_task
from launcher.places import Checkpoint, find_checkpoint
from launcher.start import start_ranks
from launcher.validate import check_training
from launcher.verbs.train import positive, ranks_to_start
from launcher.work import Ranks, Work, from_environment, is_first_rank
from model import families
from model.config import ObjectiveName
from parallel.common.errors import ConfigError, UserError
from parallel.common.files import write_json
from parallel.config import ParallelConfig

_LOSSES = "launcher.evaluation.losses"
_MODULES: dict[str, str] = {ObjectiveName.causal_lm: "launcher.evaluation.bits_per_byte"}
"""Who computes: bits per byte where every token of the text is predicted once, else the objective's own losses."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob:
    """A checkpoint to look at, and the configuration in whose layout."""

    checkpoint: Checkpoint
    config: RunConfig
    ranks: Ranks
    copy: Path | None
    """Second place for the result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskJob:
    """A checkpoint and what to ask it."""

    checkpoint: Checkpoint
    config: RunConfig
    ranks: Ranks
    questions: Questions
    copy: Path | None
    """Second place for the result."""


def main(arguments: Sequence[str]) -> int | Work:
    """Parses `CHECKPOINT [--task FILE ...] [--harness NAME ...] [--ranks N] [--json FILE]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery evaluate",
        description="Bits per byte on the validation documents, overall and by source, beside what knowing only the "
        "tokens' frequencies reaches (unigram) and beside xz -9; of models that do not predict text token after token "
        "the losses of their objective. Written to evaluation.json in the run. With --task or --harness: the figures "
        "of tasks, in any layout, written to tasks.jsonl in the run.",
        epilog="example: bloomery evaluate runs/first@200 --ranks 2 --json first.json",
    )
    parser.add_argument("checkpoint", help="a step directory, a run (its newest step), or RUN@STEP")
    parser.add_argument(
        "--ranks", type=positive, help="compute on this many local ranks (default: accelerators, else 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here too")
    parser.add_argument("--task", type=Path, action="append", default=[], metavar="FILE", help="YAML; repeatable")
    parser.add_argument(
        "--harness", action="append", default=[], metavar="NAME", help="a task of lm-evaluation-harness; repeatable"
    )
    parser.add_argument("--include", type=Path, metavar="DIR", help="with --harness: more task files")
    parser.add_argument("--few-shot", type=int, metavar="N", help="with --harness: examples before each question")
    parser.add_argument("--limit", type=positive, metavar="N", help="with --harness: the first N of each task")
    options = parser.parse_args(list(arguments))
    checkpoint = find_checkpoint(options.checkpoint)
    config = checkpoint.config()
    if options.task or options.harness:
        return _tasks(options, list(arguments), checkpoint)
    store = Store.open(Path(config.data.store))
    if not store.shards(split=VALIDATION):
        raise UserError(
            f"the store {store.path} has no validation documents: build it with data.validation.share above 0."
        )
    ranks = from_environment()
    found = result.standing(checkpoint, store)
    if found is not None:
        if is_first_rank():
            result.show(found)
            if options.json is not None:
                write_json(options.json, found)
        return 0
    wanted = ranks_to_start(ranks, options.ranks)
    if wanted > ranks.world_size:
        return start_ranks(["evaluate", *_without_ranks(options)], ranks=wanted)
    job = EvaluateJob(checkpoint=checkpoint, config=in_layout(config, wanted), ranks=ranks, copy=options.json)
    module = _MODULES.get(families.objective(config.model, config.train.objective), _LOSSES)
    return Work(module=module, job=job, rank=ranks.rank, logs=checkpoint.run.logs)


def _tasks(options: argparse.Namespace, arguments: list[str], checkpoint: Checkpoint) -> int | Work:
    """What `--task` and `--harness` ask."""
    tasks = tuple(read_task(file) for file in options.task)
    harness = HarnessTasks(
        names=tuple(options.harness), include=options.include, few_shot=options.few_shot, limit=options.limit
    )
    config, ranks = checkpoint.config(), from_environment()
    wanted = ranks_to_start(ranks, options.ranks)
    if wanted > ranks.world_size:
        place = arguments.index("--ranks") if "--ranks" in arguments else len(arguments)
        return start_ranks(["evaluate", *arguments[:place], *arguments[place + 2 :]], ranks=wanted)
    job = TaskJob(
        checkpoint=checkpoint,
        config=in_layout(config, wanted),
        ranks=ranks,
        questions=Questions(tasks=tasks, harness=harness),
        copy=options.json,
    )
    return Work(module="launcher.evaluation.tasks", job=job, rank=ranks.rank, logs=checkpoint.run.logs)


def _without_ranks(options: argparse.Namespace) -> list[str]:
    return [options.checkpoint, *(["--json", str(options.json)] if options.json is not None else [])]


def in_layout(config: RunConfig, ranks: int) -> RunConfig:
    """The run's own layout where it fits this many ranks, else plain data parallelism: the result is the same."""
    try:  # what the run looked at while it trained, such as files of tasks, need not be there any more
        check_training(replace(config, evaluate=EvaluateConfig()), ranks=ranks)
    except ConfigError:
        return replace(config, parallel=ParallelConfig())
    return config
