"""A task: a YAML file that says what to ask of a checkpoint, and data to ask it about. Imports without torch.

name: capitals
kind: multiple_choice             # what the fields below mean
data: capitals.jsonl              # beside the YAML file; or {dataset: NAME, split: test, subset: S}
prompt: "{question}\\nAnswer:"     # Python's format, from the fields of a record
choices: [" Paris", " Rome"]      # or the name of a field with a list
target: answer                    # field: the right choice or its number; the label; the reference or references
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.examples.build import read_records
from launcher.generation.options import Options
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

_datasets = Lazy("datasets")


class TaskKind(StrEnum):
    """What is asked."""

    perplexity = "perplexity"
    """How likely texts are, by a window that slides over long ones; by `group`, a field."""
    multiple_choice = "multiple_choice"
    """Which of the choices is likeliest behind the prompt, as it is and by its length."""
    classification = "classification"
    """Which class a text is of: by the head for classes, else as multiple choice; with precision, recall and F1."""
    generation = "generation"
    """What is written behind the prompt, against references: BLEU, chrF, ROUGE, exact match."""
    cloze = "cloze"
    """Which token an encoder puts in place of [MASK]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The content of the file."""

    name: str = MISSING
    kind: TaskKind = MISSING
    data: Any = MISSING
    """A jsonl file, seen from this file; or {dataset, split, subset} for Hugging Face `datasets`."""
    prompt: str = "{text}"
    """What the model reads; of perplexity the text itself."""
    target: str = "label"
    """Field with the answer."""
    choices: Any = None
    """Texts that follow the prompt, or the field that has them; of classification {label: text}."""
    group: str | None = None
    """Of perplexity: a field, over whose values figures are given too."""
    stride: int | None = None
    """Of perplexity: tokens that a window goes on by; by default half of train.sequence_length."""
    chat: bool = False
    """Of generation: the prompt is what a user says."""
    bleu_tokenize: str = "13a"
    """Of generation: sacrebleu's way to find words; zh for Chinese, char for letters."""
    limit: int | None = None
    """Only the first so many records."""
    decoding: dict[str, Any] = field(default_factory=dict)
    """Of generation: tokens, temperature, top_k, top_p, beams, length_penalty, no_repeat_ngram, stop, seed."""

    def options(self) -> Options:
        """How to decode.

        Raises:
            UserError: something that nobody knows, or makes no sense.
        """
        unknown = sorted(set(self.decoding) - set(Options.__slots__))
        if unknown:
            legal = ", ".join(Options.__slots__)
            raise UserError(f"the task {self.name} has decoding.{unknown[0]}: expected some of {legal}.")
        values = {**self.decoding, "stop": tuple(self.decoding.get("stop", ()))}
        options = Options(**values)
        for problem in options.problems():
            raise UserError(f"the task {self.name}: {problem}")
        return options


def read_task(file: Path) -> tuple[Task, list[dict[str, Any]]]:
    """A task and its records.

    Raises:
        UserError: the file is missing or says what nobody understands, or its data cannot be read.
    """
    if not file.is_file():
        raise UserError(f"--task: there is no file {file}: expected a YAML file that describes a task.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Task), OmegaConf.load(file))
        task = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{file} describes no task: {str(error).splitlines()[0]}.") from None
    assert isinstance(task, Task)
    records = _records(task, file.parent)[: task.limit]
    if not records:
        raise UserError(f"{file}: its data has no records.")
    return task, records


def _records(task: Task, directory: Path) -> list[dict[str, Any]]:
    if isinstance(task.data, str):
        found = read_records(directory / task.data)
        if None in found:
            raise UserError(f"{directory / task.data}, line {found.index(None) + 1} is no JSON object.")
        return [record for record in found if record is not None]
    known = {"dataset", "split", "subset"}
    if not isinstance(task.data, Mapping) or "dataset" not in task.data or set(task.data) - known:
        raise UserError(f"the task {task.name}: data is {task.data!r}: expected a jsonl file, or {{dataset: NAME}}.")
    try:
        place, split = (task.data["dataset"], task.data.get("subset")), task.data.get("split", "test")
        dataset = _datasets.load_dataset(*place, split=split)
    except (OSError, ValueError) as error:
        raise UserError(f"the task {task.name}: the data set cannot be read: {error}") from error
    return [dict(record) for record in dataset]


def filled(task: Task, record: Mapping[str, Any]) -> str:
    """The prompt of a record.

    Raises:
        UserError: the record lacks a field.
    """
    try:
        return task.prompt.format_map(record)
    except (KeyError, IndexError, ValueError) as error:
        said = f"prompt {task.prompt!r} cannot be filled: {error} ({_short(record)})"
        raise UserError(f"the task {task.name}: {said}") from None


def target_of(task: Task, record: Mapping[str, Any]) -> Any:
    """The answer of a record.

    Raises:
        UserError: it has none.
    """
    if task.target not in record:
        raise UserError(f"the task {task.name}: a record has no field {task.target}: {_short(record)}")
    return record[task.target]


def choices_of(task: Task, record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Names and texts of the choices of a record.

    Raises:
        UserError: it has none.
    """
    given = record.get(task.choices) if isinstance(task.choices, str) else task.choices
    if isinstance(given, Mapping) and len(given) > 1:
        return [str(name) for name in given], [str(text) for text in given.values()]
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 1:
        return [str(text) for text in given], [str(text) for text in given]
    raise UserError(f"the task {task.name}: choices is {given!r}: expected a list of texts, or the field that has it.")


def _short(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str)[:100]
