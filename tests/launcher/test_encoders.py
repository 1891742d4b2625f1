"""Encoders as a user trains them: learning that beats what needs no model, resuming to the bit, export, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
import yaml

import launcher.evaluation.tasks  # so that forked ranks find it imported
from launcher.evaluation.metrics import classified
from launcher.verbs.conversion import export_main, import_main
from tests.launcher.test_conversion import in_process
from tests.launcher.tiny import configuration, in_layout, ran, texts

assert launcher.evaluation.tasks

pytestmark = pytest.mark.distributed

BERT: dict[str, Any] = {
    "family": "bert", "activation": "exact_gelu", "norm": "layer", "norm_placement": "after", "position": "learned",
    "linear_bias": True, "tie_embeddings": True, "next_sentence": True, "kv_heads": None,
}  # fmt: skip
T5: dict[str, Any] = {
    "family": "t5", "decoder_layers": 2, "activation": "geglu", "position": "relative", "kv_heads": None,
    "query_pre_attention_scalar": 1,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"bert": (BERT, {}), "t5": (T5, {})}
STEPS = 30


def make(directory: Path, store: Path, name: str, **sections: Any) -> Path:
    directory.mkdir(exist_ok=True)
    model, train = MODELS[name]
    chosen = {"steps": STEPS, "global_batch_size": 8, **train, **sections.pop("train", {})}
    return configuration(directory, store, model=model, train=chosen, checkpoint={"every_steps": 15}, **sections)


def losses(directory: Path) -> dict[int, Any]:
    lines = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"], line["batch_hash"]) for line in lines}


@pytest.mark.parametrize("name", MODELS)
def test_thirty_steps_resume_to_the_bit_and_are_exported(name: str, store: Path, tmp_path: Path) -> None:
    config, directory = make(tmp_path / "x", store, name), tmp_path / "x"
    said = ran("train", config, ranks=2)
    found = losses(directory)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found[STEPS][0] < found[1][0]
    shutil.rmtree(directory / "run" / "checkpoints" / f"step-{STEPS:08d}")
    said = ran("train", config, ranks=2)
    assert "going on after step 15" in said
    assert losses(directory) == found
    assert in_process(export_main, directory / "run", "--output", tmp_path / "hf") == 0
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    again = getattr(transformers, described["architectures"][0]).from_pretrained(tmp_path / "hf")
    assert sum(parameter.numel() for parameter in again.parameters()) > 10_000
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").vocab_size > 300
    said = ran("generate", directory / "run", "--prompt", "iron [MASK]")
    ASKED[name](directory, again.eval(), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"))


def asked(directory: Path, records: list[dict[str, Any]], layout: dict[str, int], **task: Any) -> dict[str, Any]:
    """The figures of a task, found by two ranks."""
    (directory / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "t.yaml").write_text(yaml.safe_dump({"name": "t", "data": "t.jsonl", **task}))
    arguments = ("--task", directory / "t.yaml", "--json", directory / "t.json")
    with in_layout(directory / "run", layout):
        ran("evaluate", directory / "run", *arguments, ranks=2)
    return json.loads((directory / "t.json").read_text())["tasks"]["t"]


def pairs_are_told_as_by_transformers(directory: Path, model: Any, tokenizer: Any) -> None:
    fills = transformers.pipeline("fill-mask", model=str(directory.parent / "hf"))
    (sample,) = [json.loads(line) for line in (directory / "run" / "samples.jsonl").read_text().splitlines()]
    best = fills(f"iron {tokenizer.mask_token}", top_k=5)
    for (text, share), each in zip(sample["candidates"][0], best, strict=True):
        assert (text, share) == (each["token_str"], pytest.approx(each["score"], rel=1e-4))
    words = [text.split() for text in texts("pairs", 20)]
    records = [
        {"first": " ".join(each[:10]), "second": " ".join(each[10:20]), "label": number % 3 > 0}
        for number, each in enumerate(words)
    ]
    figures = asked(directory, records, {"context": 2}, kind="next_sentence", prompt="{first}")
    told = []
    for record in records:
        read = tokenizer(record["first"], record["second"], return_tensors="pt")
        assert read["input_ids"].shape[1] <= 32
        with torch.no_grad():
            answers = model(**read).seq_relationship_logits
        told.append(not int(answers.argmax()))  # theirs says first that it follows
    expected = classified([str(record["label"]) for record in records], [str(each) for each in told])
    assert figures == {"kind": "next_sentence", "records": 20, **expected}


def spans_are_told_as_by_transformers(directory: Path, model: Any, tokenizer: Any) -> None:
    """Drawn, because after thirty steps the likeliest span is an empty one."""
    prompts = ["iron ore [MASK] air fire [MASK]", "clay [MASK] slag"]
    marks = [f"<|reserved_{number}|>" for number in (16, 17)]
    sentinels = tokenizer.convert_tokens_to_ids(marks)
    read = tokenizer(
        [prompt.replace("[MASK]", marks[0], 1).replace("[MASK]", marks[1]) for prompt in prompts],
        padding=True,
        return_tensors="pt",
    )
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for seed in range(10):  # until both say something
        torch.manual_seed(seed)
        rows = model.generate(**read, max_new_tokens=16, do_sample=True, top_k=0, top_p=1.0).tolist()
        told = [
            [span(row[1:], mark, {*sentinels[: prompt.count("[MASK]")], *ends}, tokenizer) for mark in sentinels]
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        if told[0][0] and told[1][0]:
            break
    else:
        pytest.fail("of ten draws none tells a span")
    answers = [[told[0][0], told[0][1] + " iron"], told[1][0]]
    records = [{"text": prompt, "label": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    decoding = {"tokens": 16, "temperature": 1.0, "seed": seed}
    figures = asked(directory, records, {}, kind="cloze", decoding=decoding)
    assert figures == {"kind": "cloze", "records": 2, "accuracy": pytest.approx(2 / 3)}


def span(row: list[int], mark: int, ends: set[int], tokenizer: Any) -> str:
    behind = row[row.index(mark) + 1 :] if mark in row else []
    end = next((place for place, token in enumerate(behind) if token in ends), len(behind))
    return tokenizer.decode(behind[:end]).strip()


ASKED = {"bert": pairs_are_told_as_by_transformers, "t5": spans_are_told_as_by_transformers}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_comes_back_with_the_same_evaluation(name: str, store: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "x", store, name, train={"steps": 10})
    said = ran("train", config)
    assert in_process(export_main, tmp_path / "x" / "run", "--output", tmp_path / "hf") == 0
    assert in_process(import_main, tmp_path / "hf", "--output", tmp_path / "imported") == 0
    still = ("optimizer.learning_rate=1e-12", "optimizer.schedule.warmup_steps=0", "optimizer.weight_decay=0")
    start = (f"checkpoint.load={tmp_path / 'imported'}", "checkpoint.load_parts=weights", "train.steps=1")
    said = ran("train", config, f"run.dir={tmp_path / 'again'}", *start, *still)
    found = []
    for directory in (tmp_path / "x" / "run", tmp_path / "again"):
        said = ran("evaluate", directory)
        assert "Nats a label" in said
        found.append(json.loads((directory / "evaluation.json").read_text()))
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], rel=1e-5)
    assert found[1]["baselines"] == found[0]["baselines"]
    assert found[1]["tokens"] == found[0]["tokens"] > 100


@pytest.mark.truth
def test_gaps_of_an_imported_bert_are_filled_as_by_transformers(tmp_path: Path) -> None:
    """It never saw an end of a document of ours: around a text stands what its own tokenizer puts there."""
    words = sorted({word for text in texts("code") for word in text.split()})
    ids = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(ids, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(tmp_path / "bert")
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=len(ids), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert in_process(import_main, tmp_path / "bert", "--output", tmp_path / "run") == 0
    text = "iron [MASK] clay [MASK]"
    ran("generate", tmp_path / "run", "--prompt", text, "--json", tmp_path / "filled.json")
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path / "bert"))
    (filled,) = json.loads((tmp_path / "filled.json").read_text())
    for ours, theirs in zip(filled["candidates"], pipeline(text), strict=True):
        assert [word for word, _ in ours] == [each["token_str"] for each in theirs]
        assert [share for _, share in ours] == pytest.approx([each["score"] for each in theirs], rel=1e-4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.objective=causal_lm", "train.objective"),
        ("model.sliding_window=8", "model.sliding_window"),
        ("model.moe.experts=4", "model.moe.experts"),
        ("data.fill_in_the_middle.rate=0.5", "data.fill_in_the_middle.rate"),
        ("data.masking.share=1.5", "data.masking.share"),
    ],
)
def test_what_an_encoder_cannot_have_is_named(change: str, told: str, store: Path, tmp_path: Path) -> None:
    said = ran("train", make(tmp_path / "x", store, "bert"), change, code=2)
    assert f"{told} is " in said
    assert not (tmp_path / "x" / "run").exists()
