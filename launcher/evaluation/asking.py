"""A task put to a checkpoint: what it answers, and how well.

Likelihoods and classes come from the live model on all ranks, texts and gaps from `transformers` on the first rank.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.examples.kinds import Facts
from data_pipeline.marks import of_tokenizer
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from launcher.config import RunConfig
from launcher.conversion.export import needed_tokenizer
from launcher.evaluation.baselines import bits_per_byte
from launcher.evaluation.metrics import classified, written
from launcher.evaluation.scoring import Row, Scorer, windows
from launcher.evaluation.task import Task, TaskKind, choices_of, filled, target_of
from launcher.generation.filling import Filler
from launcher.generation.writer import MASK, Writer
from launcher.places import Checkpoint
from model import families
from model.config import Classified
from parallel.common.errors import UserError

Records = Sequence[Mapping[str, Any]]
Found = dict[str, float]


class Asked:
    """A checkpoint that answers tasks; what that needs is loaded when it is needed. Every rank has one."""

    def __init__(self, checkpoint: Checkpoint, config: RunConfig, *, rank: int) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.rank = rank
        self.architecture = families.family(config.model).architecture
        self.tokenizer: Tokenizer = needed_tokenizer(checkpoint, config)

    @cached_property
    def scorer(self) -> Scorer:
        """The live model."""
        if self.architecture is families.Architecture.encoder_decoder:
            raise UserError("a t5 tells no likelihood of a continuation: ask it by a task of generation.")
        rows = self.config.model.vocabulary_size or Store.open(Path(self.config.data.store)).vocabulary_size
        return Scorer(self.checkpoint, self.config, vocabulary_size=rows, padding=self.tokenizer.padding)

    @cached_property
    def writer(self) -> Writer:
        """The model in `transformers`."""
        return Writer(self.checkpoint)

    @cached_property
    def filler(self) -> Filler:
        """The same of an encoder."""
        return Filler(self.checkpoint)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of a text behind another one, the two of them tokenised together as they stand, and
        whether it is what would be written."""
        if self.architecture is not families.Architecture.causal:
            raise UserError("an encoder tells no likelihood of a continuation: it has no left and right.")
        encode, rows = self.tokenizer.encode_batch, []
        wholes, befores = encode([a + b for a, b in pairs]), encode([a for a, _ in pairs])
        for whole, before in zip(wholes, befores, strict=True):
            ids = [self.tokenizer.end_of_document, *whole]
            # Where the border lies inside a token, that token counts as a part of what follows.
            rows.append(Row(ids=ids, asked=range(min(len(before), len(whole) - 1) + 1, len(ids))))
        return self.scorer.scores(rows)


def ask(asked: Asked, task: Task, records: Records) -> Found:
    """The figures of a task, on every rank that computes them, and on the first one; all ranks call this.

    Raises:
        UserError: the task cannot be put to this model, or its records are not what it says.
    """
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
        found = windows([end, *ids, end], length, stride)
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


def _classes(asked: Asked, task: Task, records: Records) -> list[str]:
    """What the head says of each text, by name."""
    facts = Facts.read(Path(asked.config.data.store))
    if facts is None or asked.config.model.classes.of is not Classified.texts:
        raise UserError(f"the task {task.name} asks for classes of texts, for which the checkpoint has no head.")
    encoder = asked.architecture is families.Architecture.encoder
    known, end, rows = of_tokenizer(asked.tokenizer), asked.tokenizer.end_of_document, []
    room = asked.config.train.sequence_length - (2 if encoder else 1)
    for ids in asked.tokenizer.encode_batch([filled(task, record) for record in records]):
        kept = ids[:room]
        read = [known.first, *kept, known.separator] if encoder else [end, *kept]
        place = 0 if encoder else len(read) - 1
        rows.append(Row(ids=read, asked=range(place, place + 1)))
    return [facts.labels[number] for number in asked.scorer.classes(rows)]


def _generation(asked: Asked, task: Task, records: Records) -> Found:
    options, prompts = task.options(), [filled(task, record) for record in records]
    truth = [target_of(task, record) for record in records]
    references = [[each] if isinstance(each, str) else [str(text) for text in each] for each in truth]
    if len({len(each) for each in references}) != 1:
        raise UserError(f"the task {task.name}: every record needs as many references as the others.")
    if asked.rank:
        return {}
    writer = asked.writer
    read = [
        writer.read_turns([{"role": "user", "content": prompt}]) if task.chat else writer.read(prompt)
        for prompt in prompts
    ]
    found = writer.write(read, options, chat=task.chat)
    return written(references, [text.strip() for text in found], tokenize=task.bleu_tokenize)


def _cloze(asked: Asked, task: Task, records: Records) -> Found:
    if asked.architecture is not families.Architecture.encoder:
        raise UserError(f"the task {task.name} asks what stands as {MASK}: expected an encoder, such as a bert.")
    truth = [str(target_of(task, record)).strip() for record in records]
    if asked.rank:
        return {}
    found = [asked.filler.fill(filled(task, record))[1][0] for record in records]
    first = [candidates[0][0].strip() == answer for candidates, answer in zip(found, truth, strict=True)]
    among = [answer in {text.strip() for text, _ in each} for each, answer in zip(found, truth, strict=True)]
    return {"accuracy": float(np.mean(first)), "accuracy_top_5": float(np.mean(among))}


_KINDS: Mapping[TaskKind, Callable[[Asked, Task, Records], Found]] = {
    TaskKind.perplexity: _perplexity,
    TaskKind.multiple_choice: _multiple_choice,
    TaskKind.classification: _classification,
    TaskKind.generation: _generation,
    TaskKind.cloze: _cloze,
}
