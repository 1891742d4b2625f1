"""Several tasks put to a model, as often as anyone likes; and to nobody, to see what is wrong with them first."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from launcher.config import RunConfig
from launcher.conversion.in_memory import check_known
from launcher.evaluation.asking import Asked, ask
from launcher.evaluation.harness import Harness
from launcher.evaluation.scoring import Row, Scorer
from launcher.evaluation.task import Questions
from launcher.generation.filling import Candidates, Filler
from launcher.generation.options import Options
from launcher.generation.writer import MASK, Writer


class TaskSet:
    """Tasks with their data."""

    def __init__(self, questions: Questions, config: RunConfig) -> None:
        """For the model of a run.

        Raises:
            UserError: the harness has nothing to ask it, or something cannot be read.
        """
        self._tasks = questions.tasks
        self._config = config
        self._harness = Harness(questions.harness, config.model) if questions.harness.names else None

    def figures(self, asked: Asked) -> dict[str, dict[str, Any]]:
        """By task, whole on the first rank; all ranks call this together.

        Raises:
            UserError: a task cannot be put to this model, or its records are not what it says.
        """
        found: dict[str, dict[str, Any]] = {}
        for task, records in self._tasks:
            found[task.name] = {"kind": task.kind.value, "records": len(records), **ask(asked, task, records)}
        return found if self._harness is None else found | self._harness.figures(asked)

    def rehearse(self, run: Path) -> None:
        """Puts them to nobody, of the harness a question each; `run` is the run's directory.

        Raises:
            UserError: a task cannot be put to this run's model, or its records are not what it says.
        """
        nobody = Nobody(self._config, run)
        for task, records in self._tasks:
            ask(nobody, task, records)
        if self._harness is not None:
            self._harness.figures(nobody, limit=1)


class Nobody(Asked):
    """Answers at once, and wrongly."""

    def __init__(self, config: RunConfig, run: Path) -> None:
        super().__init__(config, run, rank=0, engine=_nothing, model=_nothing)

    def _scorer(self) -> Scorer:
        return _NoScores()

    @cached_property
    def writer(self) -> Writer:
        """Writes nothing."""
        check_known(self.config)
        return _NoTexts(self.config, self.tokenizer, None)

    @cached_property
    def filler(self) -> Filler:
        """Fills nothing in."""
        check_known(self.config)
        return _NoGaps(self.config, self.tokenizer, None)


class _NoScores(Scorer):
    def __init__(self) -> None:
        """Of no model."""

    def scores(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        return [(0.0, False) for _ in rows]

    def classes(self, rows: Sequence[Row]) -> list[list[int]]:
        return [[0 for _ in row.asked] for row in rows]

    def follows(self, rows: Sequence[Row]) -> list[bool]:
        return [False for _ in rows]


class _NoTexts(Writer):
    def write(self, prompts: Sequence[Sequence[int]], options: Options, **_: Any) -> list[str]:
        self.refuse(options)
        return ["" for _ in prompts]

    def fill(self, prompts: Sequence[str], options: Options, **_: Any) -> list[list[str]]:
        return [["" for _ in range(prompt.count(MASK))] for prompt in prompts]


class _NoGaps(Filler):
    def fill(self, text: str, count: int = 5) -> tuple[str, list[Candidates]]:
        self.read(text)
        return text, [[("", 0.0)] * count for _ in range(text.count(MASK))]


def _nothing() -> Any:
    raise AssertionError("nobody has a model")
