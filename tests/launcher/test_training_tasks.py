"""Tasks in the training loop: the figures of `bloomery evaluate`, and training that does not notice."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval.evaluator  # so that forked ranks find it imported
import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from launcher.config import load
from launcher.report.page import page
from launcher.run_directory import TASK, RunDirectory
from launcher.verbs.evaluate import in_layout
from launcher.verify.world import run_world
from parallel.checkpoint.stream import StoredTensors
from tests.launcher.test_encoders import MODELS
from tests.launcher.test_exact_resume import stopped
from tests.launcher.test_tasks import HARNESS, task
from tests.launcher.test_train import records
from tests.launcher.tiny import configuration, ran, run, texts

assert lm_eval.evaluator
assert LlamaForCausalLM
pytestmark = pytest.mark.distributed


def asking(directory: Path) -> dict[str, Any]:
    """`evaluate.tasks` with a task of each kind that a causal model can be asked."""
    documents = [{"text": text, "origin": name} for name in ("code", "prose") for text in texts(name, 2)]
    choices = [{"question": "iron", "options": [" ore", " clay fire", " air"], "answer": each} for each in (0, 1, 2)]
    ask = {"kind": "multiple_choice", "prompt": "{question}", "choices": "options", "target": "answer"}
    drawn = {"tokens": 3, "temperature": 0.8, "seed": 7}
    files = [
        task(directory, documents, name="long", kind="perplexity", group="origin", stride=8),
        task(directory, choices, name="choose", **ask),
        task(directory, [{"text": "iron", "label": "ore"}], name="write", kind="generation", decoding=drawn),
    ]
    (directory / "more").mkdir()
    data = {"data_files": {"test": str(directory / "choose.jsonl")}}
    (directory / "more" / "furnace.yaml").write_text(yaml.safe_dump({**HARNESS, "dataset_kwargs": data}))
    harness = {"harness": ["furnace"], "include": str(directory / "more")}
    return {"files": list(map(str, files)), **harness, "every_steps": 4}


def trained(directory: Path, store: Path, layout: Mapping[str, int], tasks: Mapping[str, Any], *options: str) -> Path:
    """The run of a configuration with dropout that asks these tasks."""
    directory.mkdir(exist_ok=True)
    ranks = 2 if layout else 1
    model = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 48, "dropout": 0.1}
    train = {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 32, "log_every_steps": 1}
    sections = {"model": model, "train": {**train, "deterministic": True}, "evaluate": {"tasks": dict(tasks)}}
    config = configuration(directory, store, **sections, parallel=dict(layout))
    ran("train", config, *options, ranks=ranks)
    return config


def asked(directory: Path) -> dict[tuple[int, str], dict[str, Any]]:
    """The lines of `tasks.jsonl` that the training wrote, by step and task; later ones win."""
    lines = [dict(line) for line in RunDirectory(directory / "run").tasks if "checksum" not in line]
    return {(line.pop("step"), line.pop("task")): line for line in lines}


@pytest.mark.truth
@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ({"zero_stage": 1}, "bf16"),
        ({"zero_stage": 3}, "fp32"),
        ({"pipeline": 2}, "fp32"),
    ],
    ids=["zero1-bf16", "zero3", "pp2"],
)
def test_training_asks_what_evaluate_asks_and_goes_on_unchanged(
    tmp_path: Path, store: Path, layout: dict[str, int], precision: str
) -> None:
    tasks = asking(tmp_path)
    trained(tmp_path / "asks", store, layout, tasks, f"precision={precision}")
    trained(tmp_path / "alone", store, layout, {}, f"precision={precision}")
    directory = RunDirectory(tmp_path / "asks" / "run")
    found = {record["step"]: record["tasks"] for record in directory.metrics if "tasks" in record}
    assert sorted(found) == [4, 8]
    assert records(tmp_path / "asks") == records(tmp_path / "alone")
    assert weights(tmp_path / "asks") == weights(tmp_path / "alone")
    named = [word for file in tasks["files"] for word in ("--task", file)]
    named += ["--harness", "furnace", "--include", tasks["include"]]
    kept = asked(tmp_path / "asks")
    assert {name for _, name in kept} == {"long", "choose", "write", "furnace"}
    copy = tmp_path / "copy.json"
    ran("evaluate", f"{tmp_path / 'asks' / 'run'}@4", *named, "--json", copy, ranks=2)
    for name, figures in json.loads(copy.read_text())["tasks"].items():
        assert kept[4, name] == {"checkpoint": "step-00000004", **figures}
        numbers = {f"{name}.{figure}": value for figure, value in figures.items() if isinstance(value, float)}
        assert numbers.items() <= found[4].items()


MOE = {"family": "mixtral", "moe": {"experts": 4}}
GAPS = [{"text": "iron [MASK] clay", "label": "ore"}]
PAIRS = [{"text": "iron ore", "second": "clay", "label": each} for each in (True, False)]
WRITTEN = [{"text": "iron", "label": "ore"}]
"""Records of a task, of which a line is all that the test asks."""


@pytest.mark.truth
@pytest.mark.parametrize(
    ("model", "layout", "tasks"),
    [
        (MOE, {"expert": 2}, {"generation": WRITTEN}),
        (MODELS["bert"][0], {"tensor": 2}, {"cloze": GAPS, "next_sentence": PAIRS}),
        (MODELS["t5"][0], {"pipeline": 2}, {"cloze": GAPS}),
    ],
    ids=["experts", "bert-tp2", "t5-pp2"],
)
def test_every_kind_of_model_is_asked(
    tmp_path: Path, store: Path, model: dict[str, Any], layout: dict[str, int], tasks: dict[str, list[Any]]
) -> None:
    files = [task(tmp_path, records, name=kind, kind=kind) for kind, records in tasks.items()]
    sections = {"model": model, "train": {"steps": 4}, "parallel": layout}
    ask = {"tasks": {"files": list(map(str, files)), "every_steps": 4}}
    codes, said = run("train", configuration(tmp_path, store, evaluate=ask, **sections), ranks=2)
    assert codes == [0, 0], said
    named = [word for file in files for word in ("--task", file)]
    codes, said = run("evaluate", tmp_path / "run", *named, "--json", tmp_path / "found.json", ranks=2)
    assert codes == [0, 0], said
    for name, figures in json.loads((tmp_path / "found.json").read_text())["tasks"].items():
        assert asked(tmp_path)[4, name] == {"checkpoint": "step-00000004", **figures}


def weights(directory: Path) -> dict[str, bytes]:
    """Of the last checkpoint, to the bit."""

    def read() -> dict[str, bytes]:
        tensors = StoredTensors(directory / "run" / "checkpoints" / "step-00000008")
        return {name: tensors.read(name).view(-1).view(torch.uint8).numpy().tobytes() for name in tensors.shapes}

    return run_world(read, 1)[0]


def test_a_resumed_run_asks_again_what_comes_after(tmp_path: Path, store: Path) -> None:
    tracking = ("tracking.tensorboard=true", "checkpoint.every_steps=1")
    config = trained(tmp_path / "whole", store, {}, asking(tmp_path), *tracking)
    copy = stopped(tmp_path, config, 6)
    ran("train", config, *tracking, f"run.dir={copy}")
    assert records(copy.parent) == records(tmp_path / "whole")
    assert asked(copy.parent) == asked(tmp_path / "whole")
    directory = RunDirectory(copy)
    told = [event for event in directory.events if event["event"] == TASK]
    assert [(event["step"], event["task"]) for event in told] == [
        (step, name) for step in (4, 8, 8) for name in ("long", "choose", "write", "furnace")
    ]
    curves = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = curves.EventAccumulator(str(directory.tensorboard))
    read.Reload()
    drawn = {point.step: point.value for point in read.Scalars("tasks/long/code/bits_per_byte")}
    assert drawn == pytest.approx({step: asked(copy.parent)[step, "long"]["code/bits_per_byte"] for step in (4, 8)})
    shown = page(directory)
    assert "<b>Tasks</b> figures from 0 to 1" in shown
    assert '"choose.accuracy"' in shown
    assert "long.perplexity" not in shown.partition("<b>Tasks</b>")[2].partition("</figure>")[0]
    ran("evaluate", f"{copy}@6", "--task", tmp_path / "choose.yaml")
    read = curves.EventAccumulator(str(directory.tensorboard / "evaluate"))
    read.Reload()
    assert [point.step for point in read.Scalars("tasks/choose/accuracy")] == [6]


def test_a_run_keeps_its_layout_though_its_tasks_are_gone(tmp_path: Path, store: Path) -> None:
    tasks = {"files": ["gone.yaml"], "every_steps": 4}
    config = load([configuration(tmp_path, store, parallel={"tensor": 2}, evaluate={"tasks": tasks})])
    assert in_layout(config, 2) == config
    assert in_layout(config, 3).parallel.tensor == 1


def test_a_task_that_is_wrong_is_told_before_the_first_step(tmp_path: Path, store: Path) -> None:
    good = {"name": "t", "kind": "multiple_choice", "choices": ["a", "b"]}
    right = [{"text": "x", "label": "a"}]
    long = {"name": "t", "kind": "generation", "decoding": {"tokens": 99}}
    learned = [
        "model.family=gpt2", "model.position=learned", "model.positions=32", "model.kv_heads=null", "model.norm=layer",
        "model.activation=gelu", "model.linear_bias=true", "model.tie_embeddings=true",
    ]  # fmt: skip
    for number, (content, written, options, sentence) in enumerate(
        (
            (good, right, ["evaluate.tasks.every_steps=null"], "evaluate.tasks.every_steps is None: expected a number"),
            (good, right, ["evaluate.tasks.files=[gone.yaml]"], "evaluate.tasks.files is 'gone.yaml': expected a YAML"),
            (good, right, ["evaluate.tasks.include=gone"], "evaluate.tasks.include is 'gone': expected a directory"),
            (good, right, ["evaluate.tasks.limit=0"], "evaluate.tasks.limit is 0: expected a number above 0"),
            (good, right, ["evaluate.tasks.harness=[t]"], "evaluate.tasks is 't': expected each task once"),
            ({**good, "kind": "guess"}, right, [], "describes no task"),
            (good, [{"text": "x", "label": "c"}], [], "evaluate.tasks: the task t: the answer 'c' is none of"),
            ({**good, "prompt": "{question}"}, right, [], "cannot be filled"),
            ({"name": "t", "kind": "cloze"}, right, [], "expected an encoder"),
            ({"name": "t", "kind": "generation"}, right, ["model.moe.experts=4"], "a llama has no experts"),
            (long, right, learned, "expected fewer than the 32 positions of the model"),
        )
    ):
        directory = tmp_path / str(number)
        directory.mkdir()
        tasks = {"files": [str(task(directory, written, **content))], "every_steps": 4}
        config = configuration(directory, store, evaluate={"tasks": tasks})
        codes, said = run("train", config, *options)
        assert (codes, sentence in said) == ([2], True), said
        assert not (directory / "run" / "metrics.jsonl").exists(), sentence
