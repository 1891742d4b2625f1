"""A task put to a model: what it answers, and how well.

Likelihoods and what heads tell come from the live model on all ranks, texts and gaps from `transformers` on the first
rank.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from data_pipeline.marks import of_tokenizer
from data_pipeline.tokenizer import Tokenizer
from launcher.config import RunConfig
from launcher.conversion.export import around, beginning, labels_of, needed_tokenizer
from launcher.conversion.in_memory import needs_transformers
from launcher.evaluation.baselines import bits_per_byte
from launcher.evaluation.metrics import classified, tagged, written
from launcher.evaluation.scoring import Row, Scorer, windows
from launcher.evaluation.task import Task, TaskKind, choices_of, filled, target_of, words_of
from launcher.generation.filling import Filler
from launcher.generation.writer import MASK, TOGETHER, Writer
from model import families
from model.config import Classified
from parallel.common.errors import UserError
from parallel.engine import Engine

Records = Sequence[Mapping[str, Any]]
Found = dict[str, float]


class Asked:
    """A model that answers tasks; what that needs is made when it is needed. Every rank has one."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        *,
        rank: int,
        engine: Callable[[], Engine],
        model: Callable[[], Any],
        alive: Callable[[], object] = dist.barrier,
    ) -> None:
        """Of a run.

        Args:
            config: in whose layout.
            run: its directory, for what is not in its store.
            rank: this one.
            engine: the live model, on all ranks together.
            model: that of `transformers` with the same weights, on the first rank; all call it together.
            alive: all call it together now and then while the first one writes, so that no wait is too long.
        """
        self.config = config
        self.run = run
        self.rank = rank
        self.architecture = families.family(config.model).architecture
        self.tokenizer: Tokenizer = needed_tokenizer(run, config)
        self.first = beginning(self.tokenizer, config)
        self._engine, self._make_model, self._alive = engine, model, alive

    @cached_property
    def scorer(self) -> Scorer:
        """The live model."""
        if self.architecture is families.Architecture.encoder_decoder:
            raise UserError("a t5 tells no likelihood of a continuation: ask it by a task of generation, or of cloze.")
        return self._scorer()

    def _scorer(self) -> Scorer:
        return Scorer(self._engine(), self.config, padding=self.tokenizer.padding)

    @cached_property
    def _model(self) -> Any:
        needs_transformers("generating and filling gaps")
        return self._make_model()

    @cached_property
    def writer(self) -> Writer:
        """The model in `transformers`, which is there on the first rank; all ranks ask for it together."""
        return Writer(self.config, self.tokenizer, self._model, alive=self._alive)

    @cached_property
    def filler(self) -> Filler:
        """The same of an encoder."""
        return Filler(self.config, self.tokenizer, self._model, alive=self._alive)

    def wait(self, prompts: int, *, together: int = TOGETHER) -> None:
        """While the first rank writes behind so many prompts."""
        for _ in range(math.ceil(prompts / together)):
            self._alive()

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of a text behind another one, the two of them tokenised together as they stand, and
        whether it is what would be written."""
        if self.architecture is not families.Architecture.causal:
            raise UserError("an encoder tells no likelihood of a continuation: it has no left and right.")
        encode, rows = self.tokenizer.encode_batch, []
        wholes, befores = encode([a + b for a, b in pairs]), encode([a for a, _ in pairs])
        for whole, before in zip(wholes, befores, strict=True):
            ids = [self.first, *whole]
            # Where the border lies inside a token, that token counts as a part of what follows.
            rows.append(Row(ids=ids, asked=range(min(len(before), len(whole) - 1) + 1, len(ids))))
        return self.scorer.scores(rows)


def ask(asked: Asked, task: Task, records: Records) -> Found:
    """The figures of a task, on every rank that computes them, and on the first one; all ranks call this.

    Raises:
        UserError: the task cannot be put to this model, or its records are not what it says.
    """
    if asked.config.model.classes.number and task.kind not in _OF_CLASSES:
        legal = " or ".join(_OF_CLASSES)
        raise UserError(
            f"the task {task.name} is one of {task.kind.value}, and the model has nothing but a head for classes: "
            f"expected a task of {legal}."
        )
    return _KINDS[task.kind](asked, task, records)


def _perplexity(asked: Asked, task: Task, records: Records) -> Found:
    length = asked.config.train.sequence_length
    stride = task.stride or max(1, length // 2)
    if not 0 < stride <= length:
        raise UserError(f"the task {task.name}: stride is {stride}: expected 1 to train.sequence_length = {length}.")
    texts, end = [filled(task, record) for record in records], asked.tokenizer.end_of_document
    rows: list[Row] = []
    owner: list[int] = []
    for number, ids in enumerate(asked.tokenizer.encode_batch(texts)):
        found = windows([asked.first, *ids, end], length, stride)
        rows += found
        owner += [number] * len(found)
    nats = np.bincount(owner, weights=[-score for score, _ in asked.scorer.scores(rows)], minlength=len(texts))
    tokens = np.bincount(owner, weights=[len(row.asked) for row in rows], minlength=len(texts))
    sizes = np.array([len(text.encode()) for text in texts])
    groups = {"": np.ones(len(texts), dtype=bool)}
    if task.group is not None:
        names = [str(record.get(task.group, "")) for record in records]
        groups |= {f"{name}/": np.array([each == name for each in names]) for name in dict.fromkeys(names)}
    result: Found = {}
    for name, inside in groups.items():
        loss = float(nats[inside].sum() / tokens[inside].sum())
        result |= {
            f"{name}bits_per_byte": bits_per_byte(float(nats[inside].sum()), int(sizes[inside].sum())),
            f"{name}loss": loss,
            f"{name}perplexity": float(np.exp(loss)),
            f"{name}tokens": float(tokens[inside].sum()),
        }
    return result


def _chosen(asked: Asked, task: Task, records: Records) -> tuple[list[list[str]], list[int], list[int]]:
    """Names of the choices of each record, the likeliest as it is, and by its length in letters."""
    names, texts = zip(*(choices_of(task, record) for record in records), strict=True)
    pairs = [(filled(task, record), text) for record, each in zip(records, texts, strict=True) for text in each]
    scores = iter([score for score, _ in asked.likelihoods(pairs)])
    plain, normed = [], []
    for each in texts:
        found = np.array([next(scores) for _ in each])
        plain.append(int(found.argmax()))
        normed.append(int((found / np.array([max(1, len(text)) for text in each])).argmax()))
    return list(names), plain, normed


def _right(task: Task, record: Mapping[str, Any], names: Sequence[str]) -> int:
    target = target_of(task, record)
    if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(names):
        return target
    if str(target) not in names:
        raise UserError(f"the task {task.name}: the answer {target!r} is none of the choices {', '.join(names)}.")
    return list(names).index(str(target))


def _multiple_choice(asked: Asked, task: Task, records: Records) -> Found:
    names, plain, normed = _chosen(asked, task, records)
    truth = [_right(task, record, each) for record, each in zip(records, names, strict=True)]
    return {
        "accuracy": float(np.mean(np.equal(plain, truth))),
        "accuracy_by_length": float(np.mean(np.equal(normed, truth))),
    }


def _classification(asked: Asked, task: Task, records: Records) -> Found:
    if asked.config.model.classes.number:
        truth = [str(target_of(task, record)) for record in records]
        return classified(truth, _classes(asked, task, records))
    names, plain, _ = _chosen(asked, task, records)
    truth = [each[_right(task, record, each)] for record, each in zip(records, names, strict=True)]
    return classified(truth, [each[number] for each, number in zip(names, plain, strict=True)])


def _labels(asked: Asked, task: Task, of: Classified) -> tuple[str, ...]:
    """Names of the classes that the head tells apart."""
    classes = asked.config.model.classes
    if not classes.number or classes.of is not of:
        raise UserError(f"the task {task.name} asks for classes of {of.value}, for which the model has no head.")
    labels = labels_of(asked.run, asked.config)
    if not labels:
        raise UserError(
            f"the task {task.name} needs the names of the classes: expected them in {asked.config.data.store}."
        )
    return labels


def _classes(asked: Asked, task: Task, records: Records) -> list[str]:
    """What the head says of each text, by name; of a text that is too long its beginning is read."""
    labels = _labels(asked, task, Classified.texts)
    before, behind = around(asked.tokenizer, asked.config)
    room, rows = asked.config.train.sequence_length - len(before) - len(behind), []
    for ids in asked.tokenizer.encode_batch([filled(task, record) for record in records]):
        read = [*before, *ids[:room], *behind]
        encoder = asked.architecture is families.Architecture.encoder
        rows.append(Row(ids=read, asked=[0 if encoder else len(read) - 1]))
    return [labels[number] for (number,) in asked.scorer.classes(rows)]


def _token_classification(asked: Asked, task: Task, records: Records) -> Found:
    labels = _labels(asked, task, Classified.tokens)
    texts, truth = zip(*(words_of(task, record) for record in records), strict=True)
    rows, owner = [], []
    for number, words in enumerate(texts):
        found = _pieces(asked, words)
        rows += found
        owner += [number] * len(found)
    told: list[list[str]] = [[] for _ in texts]
    for number, classes in zip(owner, asked.scorer.classes(rows), strict=True):
        told[number] += [labels[each] for each in classes]
    return tagged(truth, told)


def _pieces(asked: Asked, words: Sequence[str]) -> list[Row]:
    """Words as a head reads them, each asked for at its first token; what is too long for a row in several."""
    before, behind = around(asked.tokenizer, asked.config)
    room = asked.config.train.sequence_length - len(before) - len(behind)
    encoded = asked.tokenizer.encode_batch([f" {word}" if place else word for place, word in enumerate(words)])
    pieces: list[tuple[list[int], list[int]]] = [([], [])]
    for ids in encoded:
        ids = ids[:room] or [asked.tokenizer.padding]  # even a word of no tokens has a class
        if len(pieces[-1][0]) + len(ids) > room:
            pieces.append(([], []))
        read, places = pieces[-1]
        places.append(len(before) + len(read))
        read += ids
    return [Row(ids=[*before, *read, *behind], asked=places) for read, places in pieces]


def _next_sentence(asked: Asked, task: Task, records: Records) -> Found:
    if not asked.config.model.next_sentence:
        raise UserError(f"the task {task.name} asks what follows: expected a bert with model.next_sentence.")
    truth = [target_of(task, record) for record in records]
    if wrong := [each for each in truth if each not in (0, 1)]:
        raise UserError(f"the task {task.name}: the answer {wrong[0]!r} is neither true nor false.")
    firsts = asked.tokenizer.encode_batch([filled(task, record) for record in records])
    seconds = asked.tokenizer.encode_batch([filled(task, record, task.second) for record in records])
    known, room, rows = of_tokenizer(asked.tokenizer), asked.config.train.sequence_length - 3, []
    for one, other in zip(firsts, seconds, strict=True):
        # Of what is too long, words far from the border between both go first.
        kept = other[: max(room // 2, room - len(one))]
        begun = [known.first, *one[max(0, len(one) + len(kept) - room) :], known.separator]
        rows.append(Row(ids=[*begun, *kept, known.separator], asked=[0], second=len(begun)))
    found = asked.scorer.follows(rows)
    return classified(*([str(bool(each)) for each in answers] for answers in (truth, found)))


def _generation(asked: Asked, task: Task, records: Records) -> Found:
    options, prompts = task.options(), [filled(task, record) for record in records]
    truth = [target_of(task, record) for record in records]
    references = [[each] if isinstance(each, str) else [str(text) for text in each] for each in truth]
    if len({len(each) for each in references}) != 1:
        raise UserError(f"the task {task.name}: every record needs as many references as the others.")
    writer = asked.writer
    if asked.rank:
        asked.wait(len(prompts))
        return {}
    read = [
        writer.read_turns([{"role": "user", "content": prompt}]) if task.chat else writer.read(prompt)
        for prompt in prompts
    ]
    found = writer.write(read, options, chat=task.chat)
    return written(references, [text.strip() for text in found], tokenize=task.bleu_tokenize)


def _cloze(asked: Asked, task: Task, records: Records) -> Found:
    if asked.architecture is families.Architecture.causal:
        raise UserError(
            f"the task {task.name} asks what stands as {MASK}: expected an encoder such as a bert, or a t5."
        )
    prompts, truth = [filled(task, record) for record in records], []
    for prompt, record in zip(prompts, records, strict=True):
        answers = target_of(task, record)
        truth.append([str(each).strip() for each in (answers if isinstance(answers, list) else [answers])])
        if len(truth[-1]) != prompt.count(MASK):
            told = f"{len(truth[-1])} answers for {prompt.count(MASK)} x {MASK}"
            raise UserError(f"the task {task.name}: a record has {told}: {prompt!r}.")
    two_stacks = asked.architecture is families.Architecture.encoder_decoder
    filler, writer = (None, asked.writer) if two_stacks else (asked.filler, None)
    if asked.rank:
        asked.wait(len(prompts), together=TOGETHER if two_stacks else 1)
        return {}
    if writer is not None:
        found = [[[text] for text in texts] for texts in writer.fill(prompts, task.options())]
    else:
        assert filler is not None
        found = [[[text for text, _ in gap] for gap in filler.fill(prompt)[1]] for prompt in prompts]
    gaps = [
        (answer, [text.strip() for text in texts])
        for answers, of_record in zip(truth, found, strict=True)
        for answer, texts in zip(answers, of_record, strict=True)
    ]
    figures = {"accuracy": float(np.mean([texts[0] == answer for answer, texts in gaps]))}
    if asked.architecture is families.Architecture.encoder:
        figures["accuracy_top_5"] = float(np.mean([answer in texts for answer, texts in gaps]))
    return figures


_KINDS: Mapping[TaskKind, Callable[[Asked, Task, Records], Found]] = {
    TaskKind.perplexity: _perplexity,
    TaskKind.multiple_choice: _multiple_choice,
    TaskKind.classification: _classification,
    TaskKind.token_classification: _token_classification,
    TaskKind.next_sentence: _next_sentence,
    TaskKind.generation: _generation,
    TaskKind.cloze: _cloze,
}

_OF_CLASSES = (TaskKind.classification, TaskKind.token_classification)
"""What a head for classes can be asked."""
