"""A record of a jsonl file to the document of an example store.

What is written in a conversation is only text: a record whose text has the name of a special token of the tokenizer is
refused, because the template's own tokens are read by name, and it could end a turn.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from data_pipeline.examples.chat import render, spans
from data_pipeline.examples.kinds import BEGIN, END, Facts, Kind
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import UserError

FIELDS: Mapping[Kind, tuple[tuple[str, ...], ...]] = {
    Kind.answers: (("messages",), ("prompt", "completion")),
    Kind.text_classes: (("text", "label"),),
    Kind.token_classes: (("words", "labels"),),
}


class Refused(Exception):
    """A record that cannot be used, and why."""


def kind_of(record: Mapping[str, Any]) -> Kind:
    """What a record is an example of, by its fields.

    Raises:
        Refused: it is none.
    """
    for kind, choices in FIELDS.items():
        if any(all(field in record for field in fields) for fields in choices):
            return kind
    raise Refused("none of the fields that an example has")


class Encoder:
    """Makes documents for one store."""

    def __init__(self, tokenizer: Tokenizer, facts: Facts) -> None:
        ids, special = tokenizer.ids(), tokenizer.special_ids()
        self._tokenizer = tokenizer
        self._facts = facts
        self._begin, self._end = ids[BEGIN], ids[END]
        self._special = [name for name, number in ids.items() if number in special]
        self._ordinary = sorted(number for number in ids.values() if number not in special)
        self._number = {label: number for number, label in enumerate(facts.labels)}
        self._named = {"bos_token": tokenizer.token(tokenizer.end_of_document)}
        self._named["eos_token"] = self._named["bos_token"]

    def __call__(self, record: Mapping[str, Any]) -> list[int]:
        """The ids of a record's document, without its end.

        Raises:
            Refused: the record is not of the store's kind, or not what its fields say.
            UserError: the chat template cannot be used.
        """
        if kind_of(record) is not self._facts.kind:
            raise Refused(f"not an example of {self._facts.kind.value}")
        if self._facts.kind is Kind.text_classes:
            text, label = record["text"], str(record["label"])
            return [*self._plain(_text(text)), self._begin, self._class(label), self._end]
        if self._facts.kind is Kind.token_classes:
            return self._words(record)
        if "messages" in record:
            return self._conversation(record["messages"])
        prompt, answer = self._plain(_text(record["prompt"])), self._plain(_text(record["completion"]))
        if not answer:
            raise Refused("an empty completion")
        return [*prompt, self._begin, *answer, self._end]

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation that the assistant is to go on with."""
        assert self._facts.chat_template is not None
        self._check(messages)
        text = render(self._facts.chat_template, messages, self._named, prompt=True)
        return self._tokenizer.encode_marked(text)[0]

    def _conversation(self, messages: Any) -> list[int]:
        assert self._facts.chat_template is not None
        self._check(messages)
        text, places = spans(self._facts.chat_template, messages, self._named)
        if not places:
            raise Refused("a conversation in which the assistant says nothing")
        ids, starts = self._tokenizer.encode_marked(text)
        borders = np.searchsorted(starts, np.array(places)).ravel().tolist()
        document: list[int] = []
        for number, (first, end) in enumerate(pairwise([0, *borders, len(ids)])):
            document += [self._begin, *ids[first:end], self._end] if number % 2 else ids[first:end]
        return document

    def _check(self, messages: Any) -> None:
        if not isinstance(messages, list) or not messages:
            raise Refused("messages is not a list of turns")
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise Refused("a turn without a role")
            content = message.get("content")
            if not isinstance(content, str):
                raise Refused("a turn whose content is not text")
            if any(name in content for name in self._special):
                raise Refused("a turn with the name of a special token")

    def _words(self, record: Mapping[str, Any]) -> list[int]:
        words, labels = record["words"], record["labels"]
        if not isinstance(words, list) or not isinstance(labels, list) or len(words) != len(labels) or not words:
            raise Refused("words and labels are not lists of one length")
        ids: list[int] = []
        classes: list[int] = []
        for place, (word, label) in enumerate(zip(words, labels, strict=True)):
            found = self._plain(f" {_text(word)}" if place else _text(word))
            if not found:
                raise Refused("a word of no tokens")
            ids += found
            classes += [self._class(str(label)), *[self._tokenizer.padding] * (len(found) - 1)]
        return [*ids, self._begin, *classes, self._end]

    def _class(self, label: str) -> int:
        if label not in self._number:
            raise Refused(f"the label {label} is none of {', '.join(self._facts.labels)}")
        return self._ordinary[self._number[label]]

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.encode_batch([text])[0]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Refused("a field that is not text")
    return value


def labels_of(records: Sequence[Mapping[str, Any]], kind: Kind, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes that stand in some records, in the order of their names; or those known, where they are among them.

    Raises:
        UserError: there are fewer than two.
    """
    if kind is Kind.answers:
        return ()
    found: set[str] = set()
    for record in records:
        value = record.get("label" if kind is Kind.text_classes else "labels")
        found |= {str(each) for each in (value if isinstance(value, list) else [value])}
    if len(found) < 2:
        raise UserError(f"the examples have the one label {next(iter(found), '')!r}: two or more are to be told apart")
    return tuple(known) if found <= set(known) else tuple(sorted(found))
