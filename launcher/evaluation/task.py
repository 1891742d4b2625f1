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
from yaml import YAMLError

from data_pipeline.examples.build import read_records
from launcher.generation.options import Options
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

_datasets = Lazy("datasets")
_datasets_exceptions = Lazy("datasets.exceptions")


class TaskKind(StrEnum):
    """What is asked."""

    perplexity = "perplexity"
    """How likely texts are, by a window that slides over long ones; by `group`, a field."""
    multiple_choice = "multiple_choice"
    """Which of the choices is likeliest behind the prompt, as it is and by its length."""
    classification = "classification"
    """Which class a text is of: by the head for classes, else as multiple choice; with precision, recall and F1."""
    token_classification = "token_classification"
    """Which class each word is of, by the head for classes of tokens; of entities too."""
    next_sentence = "next_sentence"
    """Whether a text follows another one, by an encoder's head for it."""
    generation = "generation"
    """What is written behind the prompt, against references: BLEU, chrF, ROUGE, exact match."""
    cloze = "cloze"
    """Which token an encoder puts in place of [MASK], and which span a T5 tells for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """The content of the file."""

    name: str = MISSING
    kind: TaskKind = MISSING
    data: Any = MISSING
    """A jsonl file, seen from this file; or {dataset, split, subset} for Hugging Face `datasets`."""
    prompt: str = "{text}"
    """What the model reads; of perplexity the text itself."""
    target: str | None = None
    """Field with the answer; by default `label`, of token_classification `labels`, one each word."""
    words: str = "words"
    """Of token_classification: the field with the words."""
    second: str = "{second}"
    """Of next_sentence: the text that follows the prompt, or does not; true or false is the answer."""
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
    """Of generation, and of cloze by a T5: tokens, temperature, top_k, top_p, beams, length_penalty, no_repeat_ngram,
    stop, seed."""

    @property
    def answer(self) -> str:
        """The field with the answer."""
        return self.target or ("labels" if self.kind is TaskKind.token_classification else "label")

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


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness, and how they are asked."""

    names: tuple[str, ...] = ()
    include: Path | None = None
    """A directory of more task files."""
    few_shot: int | None = None
    """Examples before each question."""
    limit: int | None = None
    """Only the first so many questions of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """Everything that is asked of a model at a time."""

    tasks: tuple[tuple[Task, list[dict[str, Any]]], ...]
    """Each with its records."""
    harness: HarnessTasks


def read_task(file: Path) -> tuple[Task, list[dict[str, Any]]]:
    """A task and its records.

    Raises:
        UserError: the file is missing or says what nobody understands, or its data cannot be read.
    """
    task = described(file)
    records = _records(task, file.parent)[: task.limit]
    if not records:
        raise UserError(f"{file}: its data has no records.")
    return task, records


def described(file: Path) -> Task:
    """A task without its records.

    Raises:
        UserError: the file is missing or says what nobody understands.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}: expected a YAML file that describes a task.")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Task), OmegaConf.load(file))
        task = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, ValueError, YAMLError) as error:
        raise UserError(f"{file} describes no task: {str(error).splitlines()[0]}.") from None
    assert isinstance(task, Task)
    task.options()
    return task


def _records(task: Task, directory: Path) -> list[dict[str, Any]]:
    if isinstance(task.data, str):
        found = read_records(directory / task.data)
        if None in found:
            raise UserError(f"{directory / task.data}, line {found.index(None) + 1} is no JSON object.")
        return [record for record in found if record is not None]
    known = {"dataset", "split", "subset"}
    if not isinstance(task.data, Mapping) or "dataset" not in task.data or set(task.data) - known:
        raise UserError(f"the task {task.name}: data is {task.data!r}: expected a jsonl file, or {{dataset: NAME}}.")
    name, split = str(task.data["dataset"]), task.data.get("split", "test")
    place = directory / name
    try:
        dataset = _datasets.load_dataset(str(place) if place.is_dir() else name, task.data.get("subset"), split=split)
    except (OSError, ValueError, _datasets_exceptions.DatasetsError) as error:
        raise UserError(f"the task {task.name}: the data set cannot be read: {error}") from error
    named = task.choices is None and task.kind in (TaskKind.classification, TaskKind.token_classification)
    feature = dataset.features.get(task.answer) if named else None
    return [{**record, **_by_name(feature, task.answer, record)} for record in dataset]


def _by_name(feature: Any, field: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The classes of a record by their names, where the data set numbers them."""
    numbered = getattr(feature, "feature", feature)  # that of a list
    if not hasattr(numbered, "int2str"):
        return {}
    return {field: numbered.int2str(record[field])}


def filled(task: Task, record: Mapping[str, Any], template: str | None = None) -> str:
    """The prompt of a record, or another template's text.

    Raises:
        UserError: the record lacks a field.
    """
    chosen = task.prompt if template is None else template
    try:
        return chosen.format_map(record)
    except (KeyError, IndexError, ValueError) as error:
        said = f"prompt {chosen!r} cannot be filled: {error} ({_short(record)})"
        raise UserError(f"the task {task.name}: {said}") from None


def target_of(task: Task, record: Mapping[str, Any]) -> Any:
    """The answer of a record.

    Raises:
        UserError: it has none.
    """
    return _field(task, record, task.answer)


def words_of(task: Task, record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Words and their labels.

    Raises:
        UserError: they are not lists of one length.
    """
    words, labels = _field(task, record, task.words), target_of(task, record)
    lists = isinstance(words, list) and isinstance(labels, list) and len(words) == len(labels) > 0
    if not lists or not all(isinstance(word, str) for word in words):
        told = f"{task.words} and {task.answer} are not words and a label for each"
        raise UserError(f"the task {task.name}: {told}: {_short(record)}")
    return words, [str(label) for label in labels]


def _field(task: Task, record: Mapping[str, Any], name: str) -> Any:
    if name not in record:
        raise UserError(f"the task {task.name}: a record has no field {name}: {_short(record)}")
    return record[name]


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
