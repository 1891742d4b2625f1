"""Encoders as a user trains them: learning that beats what needs no model, resuming to the bit, export, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from launcher.verbs.conversion import export_main, import_main
from tests.launcher.test_conversion import in_process
from tests.launcher.tiny import configuration, run

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
    codes, said = run("train", config, ranks=2)
    assert codes == [0, 0], said
    found = losses(directory)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found[STEPS][0] < found[1][0]
    shutil.rmtree(directory / "run" / "checkpoints" / f"step-{STEPS:08d}")
    codes, said = run("train", config, ranks=2)
    assert codes == [0, 0], said
    assert "going on after step 15" in said
    assert losses(directory) == found
    assert in_process(export_main, directory / "run", "--output", tmp_path / "hf") == 0
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    again = getattr(transformers, described["architectures"][0]).from_pretrained(tmp_path / "hf")
    assert sum(parameter.numel() for parameter in again.parameters()) > 10_000
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").vocab_size > 300
    codes, said = run("generate", directory / "run", "--prompt", "iron [MASK]")
    assert codes == [0], said


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_comes_back_with_the_same_evaluation(name: str, store: Path, tmp_path: Path) -> None:
    config = make(tmp_path / "x", store, name, train={"steps": 10})
    codes, said = run("train", config)
    assert codes == [0], said
    assert in_process(export_main, tmp_path / "x" / "run", "--output", tmp_path / "hf") == 0
    assert in_process(import_main, tmp_path / "hf", "--output", tmp_path / "imported") == 0
    still = ("optimizer.learning_rate=1e-12", "optimizer.schedule.warmup_steps=0", "optimizer.weight_decay=0")
    start = (f"checkpoint.load={tmp_path / 'imported'}", "checkpoint.load_parts=weights", "train.steps=1")
    codes, said = run("train", config, f"run.dir={tmp_path / 'again'}", *start, *still)
    assert codes == [0], said
    found = []
    for directory in (tmp_path / "x" / "run", tmp_path / "again"):
        codes, said = run("evaluate", directory)
        assert codes == [0], said
        assert "Nats a label" in said
        found.append(json.loads((directory / "evaluation.json").read_text()))
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], rel=1e-5)
    assert found[1]["baselines"] == found[0]["baselines"]
    assert found[1]["tokens"] == found[0]["tokens"] > 100


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
    codes, said = run("train", make(tmp_path / "x", store, "bert"), change)
    assert codes == [2]
    assert f"{told} is " in said
    assert not (tmp_path / "x" / "run").exists()
