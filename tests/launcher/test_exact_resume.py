"""Stop anywhere, go on: every later loss, gradient norm and batch is that of the run that was not stopped, to the bit.

The run goes over its data twice, adds up four micro-batches a step, packs whole documents, mixes two sources and drops
activations. It saves every step; then it is resumed from every third (`make soak`: from each).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.store import Store
from launcher.run_directory import RunDirectory
from parallel.checkpoint.manifest import whole_steps
from tests.launcher.test_train import records
from tests.launcher.tiny import configuration, ran, start

STEPS = 12
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": "exact"},
    "model": {"dropout": 0.1},
    "train": {"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 64},
    "data": {"packing": "best_fit", "mixture": {"code": 0.8, "prose": 0.2}},
    "evaluate": {"every_steps": 5, "batches": 1},
    "checkpoint": {"every_steps": 1, "keep": STEPS, "asynchronous": True},
}


def whole_run(directory: Path, store: Path, ranks: int, **sections: dict[str, Any]) -> Path:
    """The configuration of a run that nothing happened to."""
    merged = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in {*SECTIONS, *sections}}
    merged["run"]["dir"] = str(directory / "run")
    merged["data"]["store"] = str(store)
    config = configuration(directory, store, **merged)
    ran("train", config, ranks=ranks)
    assert list(whole_steps(RunDirectory(directory / "run").checkpoints)) == list(range(1, STEPS + 1))
    return config


def stopped(directory: Path, config: Path, step: int) -> Path:
    """A copy of that run as if it had been stopped after `step`."""
    copy = directory / f"after-{step}" / "run"
    shutil.copytree(config.parent / "run", copy, ignore=lambda _, names: {"outcome.json"} & set(names))
    for later, path in whole_steps(copy / "checkpoints").items():
        if later > step:
            shutil.rmtree(path)
    return copy


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.fault(
    number=22,
    fault="stopped after each of twelve steps: two epochs, accumulation, packing, mixing, dropout, background saves",
    holds="every later loss, gradient norm and batch has the same bits",
    back_after=3.2,
)
@pytest.mark.parametrize("steps", [range(1, STEPS, 3), pytest.param(range(1, STEPS), marks=pytest.mark.long)], ids=repr)
def test_a_run_resumed_at_each_step_is_the_same_run(tmp_path: Path, store: Path, steps: range) -> None:
    config = whole_run(tmp_path, store, 1)
    wanted = records(tmp_path)
    assert [record["step"] for record in wanted] == list(range(1, STEPS + 1))
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/state.json").read_text())
    tokens = sum(shard.tokens for shard in Store.open(store).shards(split="training", source="code"))
    assert state["loader"]["ledger"]["code"] > 2 * tokens, "two epochs"
    copies = {step: stopped(tmp_path, config, step) for step in steps}
    attempts = {step: start("train", config, f"run.dir={copy}") for step, copy in copies.items()}
    codes = {step: attempt.wait() for step, attempt in attempts.items()}
    for step, copy in copies.items():
        assert codes[step] == [0], attempts[step].said()
        assert list(RunDirectory(copy).history)[-1]["from_step"] == step
        assert records(copy.parent) == wanted, f"after step {step}"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param({"zero_stage": 2}, {"moe": {"experts": 4, "ffn_hidden_size": 24}}, marks=pytest.mark.long),
        ({"pipeline": 2, "zero_stage": 1}, {}),
        ({"tensor": 2}, {"moe": {"experts": 4, "ffn_hidden_size": 24}}),
        pytest.param({"zero_stage": 3}, {}, marks=pytest.mark.long),
    ],
    ids=["zero2-moe", "pp2", "tp2-sp-moe", "zero3"],
)
@pytest.mark.fault(
    number=22,
    fault="the same with experts, a pipeline, tensor parallelism, ZeRO-2 and ZeRO-3",
    holds="the same bits",
    back_after=5.1,
)
def test_so_it_is_in_other_layouts(tmp_path: Path, store: Path, layout: dict[str, Any], model: dict[str, Any]) -> None:
    """Two micro-batches a step on each rank."""
    train = {"global_batch_size": 16 if layout.keys() == {"zero_stage"} else 8}
    config = whole_run(tmp_path, store, 2, parallel=layout, model=model, train=train)
    copy = stopped(tmp_path, config, 7)
    ran("train", config, f"run.dir={copy}", ranks=2)
    assert list(RunDirectory(copy).history)[-1]["from_step"] == 7
    assert records(copy.parent) == records(tmp_path)
