"""EleutherAI's lm-evaluation-harness (extra `eval`) on the live model, in whatever layout it has.

A causal checkpoint is a model of the harness: likelihoods come from all ranks, and texts that a task has written come
through `transformers`. Ids are what the harness' own `hf` model makes of the same strings, no end of a document before
them, so that both give the same numbers. Every rank runs the same tasks in the same order.
"""

import logging
import random
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
import torch

from launcher.evaluation.asking import Asked
from launcher.evaluation.scoring import Row, windows
from launcher.evaluation.task import HarnessTasks
from launcher.generation.options import Options
from model import families
from model.config import ModelConfig
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

_LM_EVAL, _EVALUATOR = Lazy("lm_eval"), Lazy("lm_eval.evaluator")
_MODEL, _TASKS = Lazy("lm_eval.api.model"), Lazy("lm_eval.tasks")
_SEEDS = 0, 1234
"""Of Python's own draws, and of all others: the harness' defaults."""

logger = logging.getLogger(__name__)


class Answers:
    """What the harness asks; of its own class `TemplateLM` too, once that is imported."""

    backend = "causal"

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self._asked = asked

    @property
    def eot_token_id(self) -> int:
        return self._asked.tokenizer.end_of_document

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._asked.tokenizer.encode_batch([string])[0]

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = [
            Row(ids=[*before, *after], asked=range(len(before), len(before) + len(after)))
            for _, before, after in requests
        ]
        return self._asked.scorer.scores(rows)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        length, owner, rows = self._asked.config.train.sequence_length, [], []
        for number, request in enumerate(requests):
            found = windows([self.eot_token_id, *self.tok_encode(request.args[0])], length, length)
            rows += found
            owner += [number] * len(found)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owner, self._asked.scorer.scores(rows), strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        writer = self._asked.writer
        if self._asked.rank:
            self._asked.wait(len(requests), together=1)
            return [""] * len(requests)
        found = []
        for request in requests:
            context, wanted = request.args
            stop = wanted.get("until", [])
            options = Options(
                tokens=wanted.get("max_gen_toks", 256),
                temperature=wanted.get("temperature", 0.0) if wanted.get("do_sample") else 0.0,
                stop=tuple([stop] if isinstance(stop, str) else stop),
            )
            found += writer.write([self.tok_encode(context)], options)
        return found


class Harness:
    """Some tasks of the harness: read once, so that nobody asks the network in the middle of a run."""

    def __init__(self, wanted: HarnessTasks, model: ModelConfig) -> None:
        """Reads the tasks, to be put to such a model, and their data.

        Raises:
            UserError: it has nothing to ask this model, is not installed, does not know a task, or cannot read its
                data.
        """
        if families.family(model).architecture is not families.Architecture.causal or model.classes.number:
            raise UserError("the harness asks how likely texts are: expected a causal model that predicts tokens.")
        if not _LM_EVAL.is_installed:
            raise UserError("tasks of the harness need lm-evaluation-harness: pip install 'bloomery[eval]'.")
        manager = _manager(wanted)
        if unknown := [name for name in wanted.names if not manager.match_tasks([name])]:
            raise UserError(
                f"no task {unknown[0]} is known to lm-evaluation-harness; --include (evaluate.tasks.include) names a "
                "directory of task files."
            )
        self._wanted = wanted
        _seed()
        try:
            self._loaded = manager.load(list(wanted.names))
        except (OSError, ValueError) as error:
            raise UserError(f"the data of {', '.join(wanted.names)} cannot be read: {error}") from error
        for task in self._loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if wanted.few_shot is not None and own != 0:  # whose description says 0 is never asked otherwise
                task.set_config("num_fewshot", wanted.few_shot)
            elif own is None:
                task.set_config("num_fewshot", 0)

    def figures(self, asked: Asked, *, limit: int | None = None) -> dict[str, dict[str, Any]]:
        """By task, on the first rank, of so many questions each; every rank calls this."""
        live = type("LiveModel", (Answers, _MODEL.TemplateLM), {})
        _seed()
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(_SEEDS[1])
        with redirect_stderr(StringIO()) as bars:  # of progress
            results = _EVALUATOR.evaluate(
                live(asked),
                self._loaded,
                limit=limit or self._wanted.limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        logger.debug("%s", bars.getvalue())
        if results is None:  # the first rank alone puts the figures together
            return {}
        return {name: figures_of(figures) for name, figures in results["results"].items()}


def _seed() -> None:
    """As its `simple_evaluate` does, which looks for packages with other programs each time and is not called here."""
    random.seed(_SEEDS[0])
    np.random.seed(_SEEDS[1])
    torch.manual_seed(_SEEDS[1])


def _manager(wanted: HarnessTasks) -> Any:
    """Who knows the tasks: to read the ten thousand files of the library's own takes each rank 9 s, so they are read
    where the directory alone does not have what is asked for."""
    if wanted.include is None:
        return _TASKS.TaskManager()
    own = _TASKS.TaskManager(include_path=str(wanted.include), include_defaults=False)
    if {*wanted.names} <= {*own.all_subtasks}:
        return own
    return _TASKS.TaskManager(include_path=str(wanted.include))


def figures_of(figures: dict[str, Any]) -> dict[str, Any]:
    """`{"acc": 0.5}` of `{"acc,none": 0.5, "alias": ...}`."""
    numbers = {key: value for key, value in figures.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
