"""EleutherAI's lm-evaluation-harness (extra `eval`) on the live model, in whatever layout it has.

A causal checkpoint is a model of the harness: likelihoods come from all ranks, and texts that a task has written come
through `transformers`. Ids are what the harness' own `hf` model makes of the same strings, no end of a document before
them, so that both give the same numbers. Every rank runs the same tasks in the same order.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.evaluation.asking import Asked
from launcher.evaluation.scoring import Row, windows
from launcher.generation.options import Options
from model import families
from parallel.common.errors import UserError

lm_eval: Any
_Base: Any = object
try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    _Base = TemplateLM
except ImportError:  # an extra: without it no task of the harness can be asked
    lm_eval = TaskManager = None


class LiveModel(_Base):
    """What the harness asks."""

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
            found = windows([self.prefix_token_id, *self.tok_encode(request.args[0])], length, length)
            rows += found
            owner += [number] * len(found)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owner, self._asked.scorer.scores(rows), strict=True):
            totals[number] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        if self._asked.rank:
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
            found += self._asked.writer.write([self.tok_encode(context)], options)
        return found


def run_harness(
    asked: Asked, names: Sequence[str], include: Path | None, *, few_shot: int | None, limit: int | None
) -> dict[str, dict[str, Any]]:
    """The figures of tasks of the harness, on the first rank; every rank calls this.

    Raises:
        UserError: it is not installed, does not know a task, or has nothing to ask this model.
    """
    if lm_eval is None or TaskManager is None:
        raise UserError("--harness needs lm-evaluation-harness: pip install 'bloomery[eval]'.")
    if asked.architecture is not families.Architecture.causal or asked.config.model.classes.number:
        raise UserError("--harness asks how likely texts are: expected a causal model that predicts tokens.")
    manager = _manager(names, include)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(f"--harness: no task {unknown[0]} is known; --include names a directory of task files.")
    results = lm_eval.simple_evaluate(
        model=LiveModel(asked), tasks=list(names), task_manager=manager, num_fewshot=few_shot, limit=limit,
        bootstrap_iters=0, log_samples=False, verbosity="ERROR",
    )  # fmt: skip
    if results is None:  # the first rank alone puts the figures together
        return {}
    return {name: figures_of(figures) for name, figures in results["results"].items()}


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """Who knows the tasks: to read the ten thousand files of the library's own takes each rank 9 s, so they are read
    where the directory alone does not have what is asked for."""
    assert TaskManager is not None
    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if {*names} <= {*own.all_subtasks}:
            return own
    return TaskManager(include_path=None if include is None else str(include))


def figures_of(figures: dict[str, Any]) -> dict[str, Any]:
    """`{"acc": 0.5}` of `{"acc,none": 0.5, "alias": ...}`."""
    numbers = {key: value for key, value in figures.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
