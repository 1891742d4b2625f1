"""Tasks: figures of the live model in layouts, against the libraries of the field and plain computations."""

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import lm_eval.api.metrics
import lm_eval.tasks
import numpy as np
import pytest
import sacrebleu
import sklearn.metrics
import torch
import yaml
from hypothesis import given, settings
from rouge_score import rouge_scorer

import launcher.evaluation.tasks  # so that forked ranks find it imported
from launcher.evaluation.metrics import classified, tagged, written
from launcher.evaluation.scoring import windows
from launcher.evaluation.task import read_task
from launcher.generation.writer import Writer
from launcher.places import find_checkpoint
from launcher.verbs.conversion import export_main
from parallel.common.errors import UserError
from tests.launcher.test_conversion import in_process
from tests.launcher.test_generate import alone
from tests.launcher.tiny import configuration, in_layout, ran, run, texts

assert launcher.evaluation.tasks
pytestmark = pytest.mark.usefixtures("transformers_imported")

LABELS = st.sampled_from(["a", "b", "c"])
TEXTS = st.lists(st.sampled_from(["iron", "ore", "fire", "clay", "铁", "air"]), max_size=8).map(" ".join)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(LABELS, LABELS), min_size=1, max_size=30))
def test_classes_are_counted_as_by_hand(pairs: list[tuple[str, str]]) -> None:
    truth, found = [first for first, _ in pairs], [second for _, second in pairs]
    figures = classified(truth, found)
    known = sorted({*truth, *found})
    precision, recall, f1 = [], [], []
    for label in known:
        right = sum(one == two == label for one, two in pairs)
        precision.append(right / max(1, found.count(label)))
        recall.append(right / max(1, truth.count(label)))
        f1.append(2 * right / max(1, found.count(label) + truth.count(label)))
    share = sum(one == two for one, two in pairs) / len(pairs)
    expected = {
        "accuracy": share, "precision_macro": np.mean(precision), "recall_macro": np.mean(recall),
        "f1_macro": np.mean(f1), "precision_micro": share, "recall_micro": share, "f1_micro": share,
    }  # fmt: skip
    assert figures == pytest.approx(expected)
    assert figures["f1_macro"] == pytest.approx(
        sklearn.metrics.f1_score(truth, found, average="macro", zero_division=0)
    )


MARKS = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.tuples(MARKS, MARKS), min_size=1, max_size=8), min_size=1, max_size=5))
def test_entities_are_counted_as_by_hand(texts: list[list[tuple[str, str]]]) -> None:
    truth, found = ([[pair[side] for pair in text] for text in texts] for side in (0, 1))
    figures = tagged(truth, found)
    words = [[label for text in side for label in text] for side in (truth, found)]
    assert classified(*words).items() <= figures.items()
    known, told = (
        {(number, *each) for number, text in enumerate(side) for each in runs(text)} for side in (truth, found)
    )
    if not known | told:
        assert not any(name.startswith("entity") for name in figures)
        return
    right = len(known & told)
    assert figures["entity_f1_micro"] == pytest.approx(2 * right / (len(known) + len(told)))
    assert figures["entity_precision_micro"] == pytest.approx(right / max(1, len(told)))
    assert figures["entity_recall_micro"] == pytest.approx(right / max(1, len(known)))
    each = []
    for kind in {entity[-1] for entity in known | told}:
        one, other = ({entity for entity in side if entity[-1] == kind} for side in (known, told))
        each.append(2 * len(one & other) / (len(one) + len(other)))
    assert figures["entity_f1_macro"] == pytest.approx(np.mean(each))


def runs(labels: list[str]) -> list[tuple[int, int, str]]:
    """Entities as a regular expression sees them: a letter a label, small where an entity may go on."""
    letters = "".join(
        "." if label == "O" else label[2].upper() if label[0] == "B" else label[2].lower() for label in labels
    )
    return [(match.start(), match.end(), match[0][0].upper()) for match in re.finditer("[Xx]x*|[Yy]y*", letters)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(TEXTS.filter(bool), TEXTS.filter(bool), TEXTS), min_size=1, max_size=6))
def test_texts_are_compared_as_the_libraries_do(rows: list[tuple[str, str, str]]) -> None:
    truth, found = [[one, two] for one, two, _ in rows], [text for *_, text in rows]
    figures = written(truth, found, tokenize="zh")
    columns = [[one for one, _, _ in rows], [two for _, two, _ in rows]]
    assert figures["bleu"] == pytest.approx(sacrebleu.BLEU(tokenize="zh").corpus_score(found, columns).score)
    assert figures["chrf"] == pytest.approx(sacrebleu.CHRF().corpus_score(found, columns).score)
    items = list(zip(truth, found, strict=True))
    assert figures["chrf"] == pytest.approx(lm_eval.api.metrics.chrf(items))
    assert written(truth, found)["bleu"] == pytest.approx(lm_eval.api.metrics.bleu(items))
    latin = all("铁" not in text for row in rows for text in row)
    if latin:  # rouge-score's own words have no other letters
        scorer = rouge_scorer.RougeScorer(["rougeL"])
        expected = np.mean([scorer.score_multi(list(row[:2]), row[2])["rougeL"].fmeasure for row in rows])
        assert figures["rougeL"] == pytest.approx(expected)
    assert figures["exact_match"] == sum(text in row for row, text in zip(truth, found, strict=True)) / len(rows)
    assert written([["铁 矿"]], ["铁 石"])["rouge1"] == pytest.approx(0.5)


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12))
def test_windows_ask_for_each_token_once(count: int, length: int, stride: int) -> None:
    ids, stride = list(range(count)), min(stride, length)
    rows = windows(ids, length, stride)
    assert [row.ids[place] for row in rows for place in row.asked] == ids[1:]
    for row in rows:
        assert len(row.ids) <= length + 1
        assert row.asked[0] >= 1
        assert row.asked[0] >= min(row.ids[row.asked[0]], length - stride + 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    ran("train", configuration(directory, store, train={"steps": 30}))
    return directory / "run"


def task(directory: Path, records: list[Any], **content: Any) -> Path:
    name = content["name"]
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    file = directory / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"data": f"{name}.jsonl", **content}))
    return file


def loss_by_hand(model: Any, ids: list[int], length: int, stride: int) -> float:
    """Summed loss of all tokens but the first, window by window, written down again."""
    total, done = 0.0, 1
    with torch.no_grad():
        while done < len(ids):
            stop = min(len(ids), length + 1) if done == 1 else min(done + stride, len(ids))
            first = max(0, stop - length - 1)
            found = model(torch.tensor([ids[first : stop - 1]])).logits[0].log_softmax(dim=-1)
            total -= sum(float(found[place - first - 1, ids[place]]) for place in range(done, stop))
            done = stop
    return total


@pytest.mark.distributed
@pytest.mark.truth
def test_figures_are_the_same_in_layouts_and_in_transformers(trained: Path, store: Path, tmp_path: Path) -> None:
    documents = [{"text": text, "origin": name} for name in ("code", "prose") for text in texts(name, 4)]
    choices = [
        {"question": "iron", "options": ["ore", "clay fire", "air"], "answer": number % 3} for number in range(5)
    ]
    ask = {"kind": "multiple_choice", "prompt": "{question} ", "choices": "options", "target": "answer"}
    sort = {"kind": "classification", "prompt": "{text}", "choices": {"x": " ore", "y": " clay"}}
    files = [
        task(tmp_path, documents, name="long", kind="perplexity", group="origin", stride=8),
        task(tmp_path, choices, name="choose", **ask | {"data": {"dataset": "chosen"}}),
        task(tmp_path, [{"text": "iron", "label": "x"}, {"text": "air", "label": "y"}], name="sort", **sort),
        task(tmp_path, [{"text": "iron", "label": "ore"}], name="write", kind="generation", decoding={"tokens": 4}),
    ]  # fmt: skip
    (tmp_path / "chosen").mkdir()
    (tmp_path / "choose.jsonl").rename(tmp_path / "chosen" / "test.jsonl")
    arguments = [word for file in files for word in ("--task", file)]
    found = {}
    for name, layout in {"one": {}, "tp2-pp2": {"tensor": 2, "pipeline": 2}, "cp2": {"context": 2}}.items():
        ranks = math.prod(layout.values())
        with in_layout(trained, layout):
            ran("evaluate", trained, *arguments, "--json", tmp_path / f"{name}.json", ranks=ranks)
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["tasks"]
    for other in ("tp2-pp2", "cp2"):
        for each, figures in found["one"].items():
            for figure, value in figures.items():
                assert found[other][each][figure] == (
                    pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                )
    long = found["one"]["long"]
    assert {"bits_per_byte", "code/bits_per_byte", "prose/perplexity"} <= long.keys()

    def by_hand() -> float:
        writer = Writer.of(find_checkpoint(str(trained)))
        end = writer.tokenizer.end_of_document
        ids = [[end, *each, end] for each in writer.tokenizer.encode_batch([record["text"] for record in documents])]
        return sum(loss_by_hand(writer.model, each, 32, 8) for each in ids)

    nats = alone(by_hand)
    size = sum(len(record["text"].encode()) for record in documents)
    assert long["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    kept = [json.loads(line)["task"] for line in (trained / "tasks.jsonl").read_text().splitlines()]
    assert {name: kept.count(name) for name in found["one"]} == dict.fromkeys(("long", "choose", "sort", "write"), 3)


DESCRIBED = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': early, '1': late}}}}
  - {name: words, list: string}
  - {name: tags, list: {class_label: {names: {'0': O, '1': B-ORE}}}}
---
"""


def test_a_data_set_is_read_with_the_names_of_its_classes(tmp_path: Path) -> None:
    records = [{"text": "iron", "label": 1, "words": ["iron", "ore"], "tags": [1, 0]}]
    ask = {"data": {"dataset": "known"}, "name": "t"}
    file = task(tmp_path, records, kind="classification", **ask)
    (tmp_path / "known").mkdir()
    (tmp_path / "known" / "README.md").write_text(DESCRIBED)
    (tmp_path / "t.jsonl").rename(tmp_path / "known" / "test.jsonl")
    for changed, field, value in (
        ({"kind": "classification"}, "label", "late"),
        ({"kind": "token_classification", "target": "tags"}, "tags", ["B-ORE", "O"]),
        ({"kind": "multiple_choice", "choices": ["a", "b"]}, "label", 1),
    ):
        file.write_text(yaml.safe_dump({**ask, **changed}))
        (_, (found,)) = read_task(file)
        assert (found["text"], found[field]) == ("iron", value)
    for wrong, told in (
        ({"dataset": "nowhere/at-all"}, "cannot be read"),
        ({"dataset": "known", "split": "train"}, "cannot be read"),
        ({"dataset": "known", "rows": 3}, "expected a jsonl file"),
    ):
        file.write_text(yaml.safe_dump({**ask, "kind": "cloze", "data": wrong}))
        with pytest.raises(UserError, match=told):
            read_task(file)


HARNESS = {
    "task": "furnace", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
    "doc_to_text": "{{question}}", "doc_to_choice": "{{options}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.truth
def test_the_harness_gives_the_numbers_of_its_own_model(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through our backend on two tensor ranks, and through `hf` on the exported weights."""
    known_here = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    rng = np.random.default_rng(0)
    words = ["iron", "ore", "fire", "clay", "air", "slag"]
    lines = []
    for _ in range(30):
        options = [f" {word}" for word in rng.choice(words, 3, replace=False)]
        lines.append({"question": " ".join(rng.choice(words, 6)), "options": options, "answer": int(rng.integers(3))})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    choose = {**HARNESS, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    read = {
        "task": "reading", "dataset_path": "json", "output_type": "loglikelihood_rolling", "test_split": "test",
        "doc_to_text": "", "doc_to_target": "{{question}}", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }  # fmt: skip
    write = {
        "task": "writing", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
        "doc_to_text": "{{question}}", "doc_to_target": "{{question}}",
        "dataset_kwargs": {"data_files": {"test": str(data)}}, "metric_list": [{"metric": "chrf"}],
        "generation_kwargs": {"until": [" clay"], "max_gen_toks": 8, "do_sample": False},
    }  # fmt: skip
    for content in (choose, read, write):
        (tmp_path / "tasks" / f"{content['task']}.yaml").write_text(yaml.safe_dump(content))
    assert in_process(export_main, trained, "--output", tmp_path / "hf") == 0

    def by_its_own() -> dict[str, Any]:
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(tmp_path / "hf"), "dtype": "float32", "max_length": 32},
            tasks=["furnace", "reading", "writing"], device="cpu", batch_size=4, bootstrap_iters=0, log_samples=False,
            task_manager=known_here(include_path=str(tmp_path / "tasks")),
        )["results"]  # fmt: skip

    theirs = alone(by_its_own)
    named = [word for name in ("furnace", "reading", "writing") for word in ("--harness", name)]
    named += ["--include", tmp_path / "tasks"]
    with in_layout(trained, {"tensor": 2}):
        said = ran("evaluate", trained, *named, "--json", tmp_path / "ours.json", ranks=2)
    ours = json.loads((tmp_path / "ours.json").read_text())["tasks"]
    compared = 0
    for name, figures in ours.items():
        for figure, value in figures.items():
            if "stderr" not in figure:
                assert value == pytest.approx(theirs[name][f"{figure},none"], abs=1e-4), (name, figure)
                compared += 1
    assert compared >= 5
    assert 0 < ours["writing"]["chrf"] < 100
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", known_here)
    said = ran("evaluate", trained, "--harness", "nothing_like_it", code=2)
    assert "no task nothing_like_it is known" in said


def test_what_is_wrong_with_a_task_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    good = {"name": "t", "kind": "multiple_choice", "choices": ["a", "b"]}
    for number, (content, records, told) in enumerate(
        (
            ({**good, "kind": "guess"}, [{"text": "x"}], "describes no task"),
            ({**good, "shots": 3}, [{"text": "x"}], "describes no task"),
            (good, [], "has no records"),
            (good, [{"text": "x", "label": "c"}], "is none of the choices a, b"),
            ({**good, "prompt": "{question}"}, [{"text": "x", "label": "a"}], "cannot be filled"),
            ({"name": "t", "kind": "cloze"}, [{"text": "x", "label": "a"}], "expected an encoder"),
            (
                {"name": "t", "kind": "generation", "decoding": {"beam": 2}},
                [{"text": "x", "label": "a"}],
                "decoding.beam",
            ),
        )
    ):
        (tmp_path / str(number)).mkdir()
        codes, said = run("evaluate", trained, "--task", task(tmp_path / str(number), records, **content))
        assert (codes, told in said) == ([2], True), said
