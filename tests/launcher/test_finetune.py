"""Fine-tuning as a user does it: conversations, pairs and classes, from a checkpoint of one's own."""

import json
import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import launcher.evaluation.tasks  # so that forked ranks find it imported
from data_pipeline.examples.kinds import CHAT_TEMPLATE, Facts, Kind
from data_pipeline.loader import single_pass
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from launcher import config as run_configuration
from launcher.assemble import make_engine, vocabulary_size
from launcher.evaluation.metrics import classified, tagged
from launcher.objective import objective_of, plan_of
from launcher.places import find_checkpoint
from launcher.verbs.conversion import export_main, import_main
from launcher.verify.world import run_world
from parallel.checkpoint.load import load
from parallel.checkpoint.stream import StoredTensors
from parallel.config import ParallelConfig
from parallel.topology import Topology
from tests.launcher.test_conversion import in_process
from tests.launcher.tiny import configuration, in_layout, ran, run, texts

assert launcher.evaluation.tasks

pytestmark = pytest.mark.distributed

BERT: dict[str, Any] = {
    "family": "bert", "activation": "exact_gelu", "norm": "layer", "norm_placement": "after", "position": "learned",
    "linear_bias": True, "tie_embeddings": True, "kv_heads": None,
}  # fmt: skip
ANSWERS = {"iron": "ore", "clay": "fire", "air": "bellows", "slag": "hammer"}


def conversations(count: int) -> list[dict[str, Any]]:
    """Questions that have an answer, behind turns that have none."""
    chosen = random.Random(0)
    found = []
    for number in range(count):
        turns = []
        for asked in chosen.sample(sorted(ANSWERS), 1 + number % 2):
            turns += [{"role": "user", "content": asked}]
            turns += [{"role": "assistant", "content": ANSWERS[asked]}]
        found.append({"messages": turns})
    return found


def labelled(count: int) -> list[dict[str, str]]:
    """Texts whose class is whether they begin with a word of the first half of the alphabet."""
    words = [text.split() for text in texts("labels", count)]
    return [{"text": " ".join(each[:8]), "label": "early" if each[0] < "f" else "late"} for each in words]


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """The run of a pretrained model."""
    directory = tmp_path_factory.mktemp("base")
    ran("train", configuration(directory, store))
    return directory / "run"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    directory = tmp_path_factory.mktemp("chats")
    file = written(directory / "chat.jsonl", conversations(60))
    said = ran(
        "data", "examples", file, "--tokenizer", store, "--output", directory / "store", "--validation-share", "0.2"
    )
    assert "examples of answers" in said
    return directory / "store"


def tuned(directory: Path, store: Path, base: Path, **sections: Any) -> Path:
    directory.mkdir(exist_ok=True)
    start = {"load": str(base), "load_parts": "weights", "every_steps": 20}
    return configuration(directory, store, checkpoint=start, **sections)


def losses(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]


def test_answers_are_learnt_from_a_checkpoint_on_two_tensor_ranks(base: Path, chats: Path, tmp_path: Path) -> None:
    train = {"steps": 20, "sequence_length": 64, "objective": "answers"}
    config = tuned(tmp_path / "tuned", chats, base, train=train, parallel={"tensor": 2}, evaluate={"every_steps": 20})
    said = ran("train", config, ranks=2)
    assert "starting from the weights" in said
    found = losses(tmp_path / "tuned")
    assert found[-1]["validation_loss"] < found[0]["loss"] / 2


@pytest.mark.truth
def test_the_loss_is_that_of_each_conversation_alone_under_a_mask(base: Path, chats: Path, tmp_path: Path) -> None:
    """Packed into rows, against each conversation by itself and a mask that is made of its text."""
    train = {"steps": 20, "sequence_length": 64, "objective": "answers"}
    config = run_configuration.load([tuned(tmp_path, chats, base, train=train)])
    opened = Store.open(chats)

    def compute() -> tuple[float, float, float, float]:
        topology = Topology.create(ParallelConfig())
        engine = make_engine(
            config, vocabulary_size=vocabulary_size(config, opened), topology=topology, objective=objective_of(config)
        )
        load(next(iter(sorted((base / "checkpoints").glob("step-*12")))), {"model": engine.participants()["model"]})
        sizes = {"sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}
        total = weight = 0.0
        for batch in single_pass(opened, "validation", plan=plan_of(config), **sizes):
            result = engine.evaluate(batch)
            total += float(result.loss * result.weight)
            weight += float(result.weight)
        engine.updater.module.eval()
        alone, count = brute_force(engine.updater.module, opened)
        return total, weight, alone, count

    ((total, weight, alone, count),) = run_world(compute, 1)
    assert weight == count
    assert total == pytest.approx(alone, rel=1e-6)


@torch.no_grad()
def brute_force(model: torch.nn.Module, store: Store) -> tuple[float, float]:
    """Summed loss and tokens of what the assistant says in the held-out conversations, each read alone."""
    facts = Facts.read(store.path)
    assert facts is not None
    assert facts.chat_template == CHAT_TEMPLATE
    from_ids = {}
    tokenizer = Tokenizer.load(store.tokenizer)
    for record in conversations(60):
        text, mask = "", []
        for message in record["messages"]:
            head, body = f"<|reserved_08|>{message['role']}\n", f"{message['content']}<|reserved_09|>"
            text, mask = text + head + body, mask + [0] * len(head) + [int(message["role"] == "assistant")] * len(body)
        ids, starts = tokenizer.encode_marked(text)
        from_ids[tuple(ids)] = [*(mask[start] for start in starts), 1]
    total = count = 0.0
    for shard in store.shards(split="validation"):
        tokens, offsets = store.tokens(shard), store.document_offsets(shard).tolist()
        for first, end in pairwise(offsets):
            ids = [token for token in tokens[first : end - 1].tolist() if tokenizer.token(token) not in MARKS]
            weights = torch.tensor(from_ids[tuple(ids)])
            inputs = torch.tensor([[tokenizer.end_of_document, *ids]])
            batch = {
                "tokens": inputs,
                "positions": torch.arange(inputs.shape[1])[None],
                "document_ids": torch.zeros(inputs.shape, dtype=torch.int32),
            }
            logits = model(0, batch)[:, 0].float()
            labels = torch.tensor([*ids, tokenizer.end_of_document])
            found = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            total, count = total + float((found * weights).sum()), count + float(weights.sum())
    return total, count


MARKS = ("<|reserved_06|>", "<|reserved_07|>")


def test_classes_are_learnt_with_a_head_that_begins_anew(base: Path, store: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "labels.jsonl", labelled(300))
    said = ran("data", "examples", file, "--tokenizer", store, "--output", tmp_path / "s", "--validation-share", "0.2")
    assert "2 classes: early, late" in said
    train = {"steps": 60, "sequence_length": 64, "global_batch_size": 8}
    sections: dict[str, Any] = {
        "train": train, "evaluate": {"every_steps": 60}, "parallel": {"pipeline": 2},
        "model": {"classes": {"number": 2}},
    }  # fmt: skip
    said = ran("train", tuned(tmp_path / "tuned", tmp_path / "s", base, **sections), ranks=2)
    found = losses(tmp_path / "tuned")[-1]
    assert found["validation_accuracy"] > 0.9
    # The head is in the run's own checkpoint: another run starts from all of it.
    again = tuned(tmp_path / "again", tmp_path / "s", tmp_path / "tuned" / "run", **sections | {"parallel": {}})
    said = ran("train", again, "train.steps=3", "evaluate.every_steps=3", "optimizer.learning_rate=1e-9")
    assert losses(tmp_path / "again")[-1]["validation_accuracy"] == pytest.approx(found["validation_accuracy"])
    they_go_to_transformers_and_back(tmp_path / "tuned" / "run", tmp_path)


def they_go_to_transformers_and_back(classifier: Path, directory: Path) -> None:
    """Its `pipeline` on the export finds the classes that `evaluate` counts, and so does `evaluate` of an import."""
    records = labelled(330)[300:]
    written(directory / "held.jsonl", records)
    task = {"name": "sort", "kind": "classification", "data": "held.jsonl"}
    (directory / "sort.yaml").write_text(yaml.safe_dump(task))
    figures = figures_of("sort", classifier, directory / "sort.yaml", ranks=2)
    assert in_process(export_main, classifier, "--output", directory / "hf") == 0
    pipeline = transformers.pipeline("text-classification", model=str(directory / "hf"))
    found = [each["label"] for each in pipeline([record["text"] for record in records], batch_size=8)]
    expected = classified([record["label"] for record in records], found)
    assert {"records": 30, "kind": "classification", **expected} == figures
    assert in_process(import_main, directory / "hf", "--output", directory / "imported") == 0
    assert figures_of("sort", directory / "imported", directory / "sort.yaml") == figures
    again = directory / "again-hf"
    assert in_process(export_main, directory / "imported", "--output", again, "--no-check") == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (directory / "hf" / name).read_bytes()
    other = shutil.copytree(directory / "hf", directory / "other-hf")  # as if it had learnt without a beginning
    content = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    assert in_process(import_main, other, "--output", directory / "other") == 0
    pipeline = transformers.pipeline("text-classification", model=str(other))
    found = [each["label"] for each in pipeline([record["text"] for record in records], batch_size=8)]
    assert (
        figures_of("sort", directory / "other", directory / "sort.yaml").items()
        >= classified([record["label"] for record in records], found).items()
    )
    they_keep_their_numbers(directory / "imported", directory)
    (directory / "other.yaml").write_text(yaml.safe_dump({**task, "kind": "generation"}))
    for arguments, told in (
        (("evaluate", classifier, "--task", directory / "other.yaml"), "expected a task of classification or token_cl"),
        (("evaluate", classifier, "--harness", "arc_easy"), "expected a causal model that predicts tokens"),
        (("generate", classifier), "tells classes apart and writes no text"),
    ):
        codes, said = run(*arguments)
        assert (codes, told in said) == ([2], True), said
    Facts(kind=Kind.text_classes, labels=("early", "late", "never")).write(directory / "s")
    codes, said = run("evaluate", classifier, "--task", directory / "sort.yaml")
    assert (codes, "tells 2 classes apart, and" in said) == ([2], True), said


def they_keep_their_numbers(imported: Path, directory: Path) -> None:
    """An import whose classes are numbered in another order is tuned on by that order, or not at all."""
    facts = Facts.read(imported)
    assert facts is not None
    turned = shutil.copytree(imported, directory / "turned")
    replace(facts, labels=facts.labels[::-1]).write(turned)
    command = ("data", "examples", directory / "labels.jsonl", "--tokenizer", turned, "--output", directory / "kept")
    said = ran(*command)
    assert "2 classes: late, early" in said
    sections: dict[str, Any] = {"train": {"steps": 9}, "model": {"classes": {"number": 2}}}
    codes, said = run("train", tuned(directory / "on", directory / "s", turned, **sections))
    assert (codes, "numbers its classes late, early" in said) == ([2], True), said


def figures_of(name: str, checkpoint: Path, task: Path, *, ranks: int = 1) -> dict[str, Any]:
    """What `evaluate --task` finds."""
    ran("evaluate", checkpoint, "--task", task, "--json", task.with_suffix(".json"), ranks=ranks)
    return json.loads(task.with_suffix(".json").read_text())["tasks"][name]


def words_with_labels(count: int) -> list[dict[str, list[str]]]:
    """Texts whose entities are runs of `iron` and `ore`, and single hammers."""
    found = []
    for text in texts("words", count):
        words, labels = text.split()[:12], []
        for place, word in enumerate(words):
            ore = word in ("iron", "ore")
            goes_on = ore and place > 0 and labels[-1] != "O" and words[place - 1] != "hammer"
            labels.append("B-TOOL" if word == "hammer" else f"{'I' if goes_on else 'B'}-ORE" if ore else "O")
        found.append({"words": words, "labels": labels})
    return found


@pytest.mark.truth
def test_a_pooler_that_learnt_next_sentences_goes_on(store: Path, tmp_path: Path) -> None:
    """As `transformers` has it of the same files; what else stands on the encoder begins anew."""
    learnt = configuration(tmp_path, store, model=BERT | {"next_sentence": True}, train={"steps": 4})
    ran("train", learnt)
    file = written(tmp_path / "labels.jsonl", labelled(40))
    ran("data", "examples", file, "--tokenizer", store, "--output", tmp_path / "s")
    sections = {"model": BERT | {"classes": {"number": 2}}, "train": {"steps": 1}, "parallel": {"tensor": 2}}
    still = ("optimizer.learning_rate=1e-12", "optimizer.weight_decay=0", "optimizer.schedule.warmup_steps=0")
    ran("train", tuned(tmp_path / "sorter", tmp_path / "s", tmp_path / "run", **sections), *still, ranks=2)

    def compare() -> None:
        before, after = (
            StoredTensors(find_checkpoint(str(path)).path) for path in (tmp_path / "run", tmp_path / "sorter" / "run")
        )
        for kind in ("weight", "bias"):
            ours, theirs = f"weight.classifier.pooler.{kind}", f"weight.next_sentence_head.pooler.{kind}"
            torch.testing.assert_close(after.read(ours), before.read(theirs), rtol=0, atol=1e-8)
            assert theirs not in after.shapes
        assert after.read("weight.classifier.output.weight").shape == (2, 32)

    assert run_world(compare, 1) == [None]


def test_an_encoder_learns_classes_of_words_that_transformers_finds_too(store: Path, tmp_path: Path) -> None:
    records = words_with_labels(230)
    file = written(tmp_path / "words.jsonl", records[30:])
    written(tmp_path / "held.jsonl", records[:30])
    said = ran("data", "examples", file, "--tokenizer", store, "--output", tmp_path / "s")
    assert "4 classes: B-ORE, B-TOOL, I-ORE, O" in said
    classes = {"number": 4, "of": "tokens"}
    train = {"steps": 30, "global_batch_size": 8, "micro_batch_size": 8}
    said = ran("train", configuration(tmp_path, tmp_path / "s", model=BERT | {"classes": classes}, train=train))
    task = {"name": "tag", "kind": "token_classification", "data": "held.jsonl"}
    (tmp_path / "tag.yaml").write_text(yaml.safe_dump(task))
    with in_layout(tmp_path / "run", {"context": 2}):
        figures = figures_of("tag", tmp_path / "run", tmp_path / "tag.yaml", ranks=2)
    assert figures["entity_f1_micro"] > 0.8
    assert in_process(export_main, tmp_path / "run", "--output", tmp_path / "hf") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "hf").eval()
    told = []
    for record in records[:30]:
        read = tokenizer(" ".join(record["words"]), return_tensors="pt", return_offsets_mapping=True)
        starts = [first + (first > 0) for first, end in read.pop("offset_mapping")[0].tolist() if end]
        logits = model(**read).logits[0, 1:-1]
        places = [len(" ".join(record["words"][:number])) + (number > 0) for number in range(len(record["words"]))]
        told.append([model.config.id2label[int(logits[starts.index(place)].argmax())] for place in places])
    expected = tagged([record["labels"] for record in records[:30]], told)
    assert {"records": 30, "kind": "token_classification", **expected} == pytest.approx(figures)


def test_what_does_not_fit_is_told(base: Path, store: Path, chats: Path, tmp_path: Path) -> None:
    for number, (place, sections, sentence) in enumerate(
        (
            (chats, {}, "train.objective is 'causal_lm': expected one that learns from examples of answers"),
            (store, {"train": {"objective": "answers"}}, "data.store is"),
            (chats, {"model": {"classes": {"number": 2}}}, "train.objective is 'classification'"),
            (store, {"model": {"classes": {"number": 2}}, "train": {"objective": "causal_lm"}}, "train.objective"),
        )
    ):
        (tmp_path / str(number)).mkdir()
        said = ran("train", tuned(tmp_path / str(number), place, base, **sections), code=2)
        assert sentence in said
    codes, said = run("data", "examples", tmp_path / "none.jsonl", "--tokenizer", store, "--output", tmp_path / "x")
    assert (codes, "there is no file" in said) == ([2], True)
    said = ran("train", tuned(tmp_path / "0", store, base, model={"hidden_size": 64, "ffn_hidden_size": 48}), code=2)
