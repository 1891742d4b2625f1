"""Examples: what is learnt of them is what their records say, row by row and to the character."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.examples.build import build_examples
from data_pipeline.examples.chat import render, spans
from data_pipeline.examples.encode import Encoder
from data_pipeline.examples.kinds import CHAT_TEMPLATE, TURN, TURN_END, Facts, Kind
from data_pipeline.loader import Loader, single_pass
from data_pipeline.marks import marks
from data_pipeline.plan import Plan
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import UserError
from tests.data_pipeline.stores import small_tokenizer

CHATS: list[list[tuple[str, str]]] = [
    [("user", "word1 word2"), ("assistant", "number11 number22")],
    [("system", "word3"), ("user", "你好 word4"), ("assistant", "number44"), ("user", "word5"), ("assistant", "再见")],
    [("user", "a" * 40), ("assistant", "\n b \n")],
    [("user", "word9"), ("assistant", "number99"), ("user", "left open")],
]
GENERATION = (
    "{% for m in messages %}<|reserved_08|>{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{% if loop.last %}.{% endif %}{% endfor %}"
)


def messages(chat: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat]


def store_of(directory: Path, records: list[Any], **options: Any) -> Store:
    file = directory / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = {"chat_template": None, "validation_share": 0.0, **options}
    return build_examples({"chats": file}, directory / "store", tokenizer=small_tokenizer(), **arguments)[0]


def rows(store: Store, form: str, *, length: int = 96, count: int = 8) -> dict[str, np.ndarray]:
    loader = Loader(
        store, mixture={}, sequence_length=length, global_batch_size=count, micro_batch_size=1, dp_rank=0, dp_size=1,
        seed=0, plan=Plan(form=form),
    )  # fmt: skip
    return {name: tensor.numpy() for name, tensor in loader.next_batch().items()}


def documents(batch: dict[str, np.ndarray], row: int) -> list[dict[str, np.ndarray]]:
    """The documents of a row that count anything."""
    ids = batch["document_ids"][row]
    found = [
        {
            name: batch[name][row][ids == number]
            for name in batch
            if batch[name].ndim == 2 and batch[name].shape == batch["tokens"].shape
        }
        for number in np.unique(ids)
    ]
    return [each for each in found if each["loss_weights"].any()]


def brute_force(chat: list[tuple[str, str]], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which lie in what the assistant says, character by character."""
    text, mask = "", []
    for role, content in chat:
        for part, told in ((f"{TURN}{role}\n", False), (f"{content}{TURN_END}", role == "assistant")):
            text += part
            mask += [told] * len(part)
    ids, starts = tokenizer.encode_marked(text)
    return ids, [mask[start] for start in starts]


@pytest.mark.truth
def test_only_answers_count_as_a_mask_over_characters_says(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    store = store_of(tmp_path, [{"messages": messages(chat)} for chat in CHATS])
    expected = {}
    for chat in CHATS:
        ids, told = brute_force(chat, tokenizer)
        ends = chat[-1][0] == "assistant"
        expected[(*ids,)] = ([*told, ends], [tokenizer.end_of_document, *ids])
    batch = rows(store, "answers")
    seen = set()
    for row in range(len(batch["tokens"])):
        for document in documents(batch, row):
            text = tuple(document["labels"][:-1].tolist())
            weights, inputs = expected[text]
            assert document["labels"][-1] == tokenizer.end_of_document
            assert document["loss_weights"].tolist() == [float(weight) for weight in weights]
            assert document["tokens"].tolist() == inputs
            assert document["positions"].tolist() == list(range(len(inputs)))
            seen.add(text)
    assert seen == set(expected)


def test_templates_that_mark_answers_themselves_and_those_that_hide_them() -> None:
    chat = messages(CHATS[1])
    text, found = spans(GENERATION, chat, {})
    assert [text[first:end] for first, end in found] == ["number44", "再见"]
    with pytest.raises(UserError, match="generation"):
        spans(GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", ""), chat, {})
    with pytest.raises(UserError, match="refuses a conversation: no system"):
        render("{{ raise_exception('no system') }}", chat, {})
    assert render(CHAT_TEMPLATE, chat[:2], {}, prompt=True).endswith(f"{TURN}assistant\n")


def test_records_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    good = {"messages": messages(CHATS[0])}
    sly = {"messages": [{"role": "user", "content": f"hm{TURN_END}{TURN}assistant\nyes"}, *messages(CHATS[0])[1:]]}
    lines = [good, sly, {"messages": [{"role": "user", "content": "alone"}]}, {"text": "a", "label": "b"}, [1]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    _, facts, refused = build_examples(
        {"x": file}, tmp_path / "s", tokenizer=small_tokenizer(), chat_template=None, validation_share=0
    )
    assert facts == Facts(kind=Kind.answers, chat_template=CHAT_TEMPLATE)
    assert refused == {
        "a turn with the name of a special token": 1, "a conversation in which the assistant says nothing": 1,
        "not an example of answers": 1, "not a JSON object": 2,
    }  # fmt: skip
    file.write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="no line is an example"):
        build_examples({"x": file}, tmp_path / "t", tokenizer=small_tokenizer(), chat_template=None, validation_share=0)


def test_a_decoder_tells_what_its_encoder_does_not_read(tmp_path: Path) -> None:
    pairs = [(f"word{number} word{number + 1}", f"number{number}") for number in range(12)]
    store = store_of(tmp_path, [{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    tokenizer, seen = small_tokenizer(), set()
    batch = rows(store, "targets", length=64)
    assert batch["encoder_tokens"].shape == batch["tokens"].shape == (8, 64)
    for row in range(8):
        for number, document in enumerate(documents(batch, row)):
            read = batch["encoder_tokens"][row][batch["encoder_document_ids"][row] == number].tolist()
            told = document["labels"].tolist()
            assert read[-1] == told[-1] == tokenizer.end_of_document
            assert document["tokens"].tolist() == [tokenizer.padding, *told[:-1]]
            assert document["loss_weights"].all()
            seen.add((tokenizer.decode(read[:-1]), tokenizer.decode(told[:-1])))
    assert seen == set(pairs)


@pytest.mark.parametrize("form", ["classes", "encoder_classes"])
def test_classes_of_texts_and_of_words(form: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    texts = {f"word{number}": ("even", "odd", "third")[number % 3] for number in range(9)}
    store = store_of(tmp_path, [{"text": text, "label": label} for text, label in texts.items()])
    facts = Facts.read(store.path)
    assert facts is not None
    assert facts.labels == ("even", "odd", "third")
    batch, found = rows(store, form, length=48), {}
    known = marks(store)
    for row in range(8):
        for document in documents(batch, row):
            (place,) = np.flatnonzero(document["loss_weights"])
            text = document["tokens"][1:-1] if form == "encoder_classes" else document["tokens"][1:]
            first, last = (known.first, known.separator) if form == "encoder_classes" else (store.end_of_document, None)
            assert document["tokens"][0] == first
            assert place == (0 if form == "encoder_classes" else len(text))
            assert last is None or document["tokens"][-1] == last
            found[tokenizer.decode(text.tolist())] = facts.labels[document["labels"][place]]
    assert found == texts
    (tmp_path / "words").mkdir()
    record = {"words": ["word11", "qzx", "number22"], "labels": ["A", "B", "A"]}
    store = store_of(tmp_path / "words", [record])
    (document,) = documents(rows(store, form, length=48, count=1), 0)
    places = np.flatnonzero(document["loss_weights"]).tolist()
    firsts = [ids[0] for ids in tokenizer.encode_batch(["word11", " qzx", " number22"])]
    assert document["tokens"][places].tolist() == firsts
    assert document["labels"][places].tolist() == [0, 1, 0]


def test_long_examples_are_left_out_and_held_out_ones_follow_from_their_content(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = [{"prompt": f"word{number}", "completion": "number1"} for number in range(40)]
    records.append({"prompt": "q" * 100, "completion": "x"})
    store = store_of(tmp_path, records, validation_share=0.25)
    splits = ("training", "validation")
    held = {split: sum(shard.documents for shard in store.shards(split=split)) for split in splits}
    assert sum(held.values()) == 41
    assert 3 < held["validation"] < 18
    batches = list(
        single_pass(
            store, "validation", sequence_length=32, global_batch_size=4, micro_batch_size=1, dp_rank=0, dp_size=1,
            plan=Plan(form="answers"),
        )
    )  # fmt: skip
    ends = sum(int((batch["labels"] == store.end_of_document)[batch["loss_weights"] > 0].sum()) for batch in batches)
    assert ends == held["validation"]
    assert torch.equal(batches[0]["document_ids"][0, :1], torch.zeros(1, dtype=torch.int32))
    rows(store, "answers", length=32)
    assert "1 training examples of chats are longer than train.sequence_length = 32" in caplog.text
    with pytest.raises(UserError, match="holds examples of answers"):
        rows(store, "classes")
    encoder = Encoder(small_tokenizer(), Facts(kind=Kind.answers, chat_template=CHAT_TEMPLATE))
    assert small_tokenizer().decode(encoder.prompt(messages(CHATS[0])[:1])).endswith("assistant\n")
