"""Where an attempt begins: never at random weights where a checkpoint is there or was asked for."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor

from launcher.run_directory import RunDirectory
from launcher.saving import Saving
from parallel.checkpoint.background import HostCopy
from parallel.checkpoint.manifest import whole_steps
from parallel.checkpoint.stream import StoredTensors
from parallel.config import CheckpointConfig
from tests.launcher.test_train import records
from tests.launcher.tiny import configuration, ran

CONSTANT = {"schedule": {"name": "constant", "warmup_steps": 0}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """The directory of a finished run of twelve steps, saved every four; copy it before you change it."""
    directory = tmp_path_factory.mktemp("finished")
    ran("train", configuration(directory, store, optimizer=CONSTANT))
    return directory


def copied(finished: Path, directory: Path, store: Path) -> Path:
    """A copy of the finished run that may be broken; returns its configuration file."""
    shutil.copytree(finished / "run", directory / "run")
    (directory / "run" / "outcome.json").unlink()
    return configuration(directory, store, optimizer=CONSTANT)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors/__0_0.distcp"])
@pytest.mark.fault(
    number=18,
    fault="the newest checkpoint of a run is truncated",
    holds="refused by the file's name; with checkpoint.fallback the one before it goes on with the same bits",
    back_after=0.8,
)
def test_a_damaged_newest_checkpoint_is_refused_unless_a_fallback_is_asked_for(
    tmp_path: Path, store: Path, finished: Path, name: str
) -> None:
    config = copied(finished, tmp_path, store)
    checkpoints = RunDirectory(tmp_path / "run").checkpoints
    _truncate(checkpoints / "step-00000012" / name)
    said = ran("train", config, code=2)
    assert f"step-00000012/{name} is damaged" in said
    assert "checkpoint.fallback=true" in said
    said = ran("train", config, "checkpoint.fallback=true")
    assert "going on after step 8" in said
    assert "is damaged" in said, "going back is told"
    assert list(checkpoints.glob(".damaged-step-00000012-*")), "the damaged one is put aside"
    assert records(tmp_path) == records(finished)
    assert list(RunDirectory(tmp_path / "run").history)[-1]["from_checkpoint"].endswith("step-00000008")


@pytest.mark.fault(
    number=19,
    fault="no checkpoint of a run is whole, then none is there",
    holds="exit code 2 both times, never random weights",
    back_after="refused, until a checkpoint is restored",
)
def test_where_no_checkpoint_is_whole_nothing_begins(tmp_path: Path, store: Path, finished: Path) -> None:
    config = copied(finished, tmp_path, store)
    for path in RunDirectory(tmp_path / "run").checkpoints.glob("step-*"):
        _truncate(path / "tensors/.metadata")
    said = ran("train", config, "checkpoint.fallback=true", code=2)
    assert "no checkpoint of the run is whole" in said
    said = ran("train", config, "checkpoint.fallback=true", code=2)
    assert "has saved step 12" in said
    assert "no checkpoint any more" in said


def test_another_run_s_checkpoint_goes_on_with_the_same_bits(tmp_path: Path, store: Path, finished: Path) -> None:
    config = configuration(tmp_path, store, optimizer=CONSTANT)
    ran("train", config, f"checkpoint.load={finished / 'run'}@4")
    assert records(tmp_path) == records(finished)[4:]
    first, *_ = RunDirectory(tmp_path / "run").history
    assert first["from_step"] == 4
    assert first["from_checkpoint"].endswith("step-00000004")
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    (tmp_path / "run/outcome.json").unlink()
    ran("train", config, "checkpoint.load=nowhere")  # what it started from is history
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.distributed
def test_weights_alone_start_a_run_at_step_zero_in_any_layout(tmp_path: Path, store: Path, finished: Path) -> None:
    asked = f"checkpoint.load={finished / 'run/checkpoints/step-00000012'}", "checkpoint.load_parts=weights"
    found = []
    for name, ranks, layout in (("one", 1, {"zero_stage": 0}), ("two", 2, {"tensor": 2})):
        directory = tmp_path / name
        directory.mkdir()
        config = configuration(directory, store, optimizer=CONSTANT, parallel=layout, train={"steps": 2})
        said = ran("train", config, *asked, ranks=ranks)
        assert "starting from the weights of" in said
        found.append(records(directory))
    one, two = found
    assert [record["step"] for record in one] == [1, 2]
    assert one[0]["tokens"] == records(finished)[0]["tokens"]
    assert one[0]["batch_hash"] == records(finished)[0]["batch_hash"], "the data begin anew"
    assert one[0]["loss"] < records(finished)[0]["loss"] - 1, "the weights do not"
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_checkpoint_that_was_asked_for_and_cannot_be_had_ends_the_attempt(
    tmp_path: Path, store: Path, finished: Path
) -> None:
    config = configuration(tmp_path, store, optimizer=CONSTANT)
    for asked, told in (
        (["checkpoint.load=nowhere"], "nowhere is not a run"),
        ([f"checkpoint.load={finished / 'run'}@5"], "has the steps 4, 8, 12"),
        ([f"checkpoint.load={finished / 'run'}"], "is after step 12, and the run has 12: give it more steps"),
        ([f"checkpoint.load={finished / 'run'}", "model.hidden_size=64"], "has the shape"),
        ([f"checkpoint.load={finished / 'run'}", "model.layers=3"], "does not fit the configured model"),
        ([f"checkpoint.load={finished / 'run'}@4", "optimizer.name=muon"], "holds the state of the optimizer adamw"),
        ([f"checkpoint.load={finished / 'run'}@4", "data.mixture={code: 1}"], "data.mixture changed"),
    ):
        said = ran("train", config, *asked, code=2)
        assert told in said
        assert not (tmp_path / "run/checkpoints").exists()
        assert records(tmp_path) == []


def test_a_clock_decides_on_rank_0_alone() -> None:
    now = 0.0
    config = CheckpointConfig(every_steps=10, every_seconds=5)
    first, second = (Saving(config, total_steps=33, rank=rank, clock=lambda: now) for rank in (0, 1))
    assert not first.ask()
    now = 5.0
    assert first.ask()
    assert not second.ask()
    for saving in (first, second):
        saving.answer(True)
        assert saving.due(3)
        saving.saved()
        saving.answer(first.ask())
        assert not saving.due(4)
        assert saving.due(10)
        assert saving.due(33)
    assert not Saving(CheckpointConfig(), total_steps=1, rank=0, clock=lambda: now + 1e9).ask()


@pytest.mark.distributed
def test_time_saves_on_all_ranks(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 3})
    ran("train", config, "checkpoint.every_steps=100", "checkpoint.every_seconds=1e-6", ranks=2)
    saved = [event for event in RunDirectory(tmp_path / "run").events if event["event"] == "saved"]
    assert [event["step"] for event in saved] == [1, 2, 3]
    assert all(event["seconds"] > 0 for event in saved)


def test_the_best_by_validation_stays(tmp_path: Path, store: Path) -> None:
    config = configuration(
        tmp_path,
        store,
        train={"steps": 6},
        optimizer={"learning_rate": 10.0, "clip_norm": 0, "schedule": {"name": "constant", "warmup_steps": 0}},
        evaluate={"every_steps": 1, "batches": 1},
        checkpoint={"every_steps": 1, "keep": 1, "keep_best": 1},
    )
    ran("train", config)
    losses = {record["step"]: record["validation_loss"] for record in records(tmp_path)}
    best = min(losses, key=lambda step: losses[step])
    assert best != 6, "a learning rate this high ruins the weights"
    names = sorted(path.name for path in RunDirectory(tmp_path / "run").checkpoints.iterdir())
    assert names == sorted({f"step-{best:08d}", "step-00000006"})


@pytest.mark.distributed
def test_saving_in_the_background_changes_no_number(tmp_path: Path, store: Path, finished: Path) -> None:
    config = configuration(tmp_path, store, optimizer=CONSTANT, checkpoint={"every_steps": 1, "asynchronous": True})
    ran("train", config, ranks=2)
    directory = RunDirectory(tmp_path / "run")
    for mine, theirs in zip(records(tmp_path), records(finished), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert list(whole_steps(directory.checkpoints)) == list(range(5, 13))
    assert [event["step"] for event in directory.events if event["event"] == "saved"] == list(range(1, 13))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    shutil.rmtree(directory.checkpoints / "step-00000012")
    directory.outcome.unlink()
    kept = records(tmp_path)
    ran("train", config, "checkpoint.asynchronous=false", ranks=2)
    assert records(tmp_path) == kept
    assert (tmp_path / "run/metrics.jsonl").read_bytes() != before, "step 12 was taken again"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("parallel", "optimizer"),
    [
        ({"zero_stage": 0}, {"average_decay": 0.9}),
        ({"zero_stage": 2, "offload": True}, {}),
        ({"zero_stage": 3}, {}),
        ({}, {"name": "muon"}),
    ],
    ids=["zero0-average", "zero2-offload", "zero3", "muon"],
)
def test_a_slow_copy_has_the_bits_of_its_step(
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    parallel: dict[str, Any],
    optimizer: dict[str, Any],
) -> None:
    """The next step's passes are over long before the copy is: its update waits, and the wait is counted as a save."""
    sections = {"parallel": parallel, "optimizer": CONSTANT | optimizer, "train": {"steps": 3}}
    config = configuration(tmp_path, store, checkpoint={"every_steps": 1}, **sections)
    ran("train", config, f"run.dir={tmp_path}/waiting", ranks=2)
    at_once = HostCopy.of

    def late(copy: HostCopy, tensors: Iterable[ShardedTensor]) -> list[ShardedTensor]:
        time.sleep(0.1)
        return at_once(copy, tensors)

    monkeypatch.setattr(HostCopy, "of", late)
    ran("train", config, f"run.dir={tmp_path}/run", "checkpoint.asynchronous=true", ranks=2)
    for step in (1, 2, 3):
        waiting, beside = (
            StoredTensors(tmp_path / name / "checkpoints" / f"step-{step:08d}") for name in ("waiting", "run")
        )
        assert waiting.shapes == beside.shapes
        for name in waiting.shapes:
            assert torch.equal(waiting.read(name), beside.read(name)), f"{name} after step {step}"
    *_, last = RunDirectory(tmp_path / "run").metrics
    assert last["time_save_seconds"] > 0.1


def test_a_mirror_gets_every_step_and_stops_nobody(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, checkpoint={"every_steps": 4, "keep": 1})
    said = ran("train", config, "checkpoint.mirror=s3://bucket/run", code=2)
    assert "checkpoint.mirror is 's3://bucket/run'" in said, "this needs a package that is not installed"
    blocked = tmp_path / "mirror"
    blocked.write_text("in the way")
    said = ran("train", config, f"checkpoint.mirror=file://{blocked}", "train.steps=8")
    assert "it is tried again at the next save" in said
    shutil.rmtree(tmp_path / "run")
    blocked.unlink()
    said = ran("train", config, f"checkpoint.mirror=file://{blocked}")
    assert max(whole_steps(blocked)) == 12
    assert list(whole_steps(tmp_path / "run/checkpoints")) == [12]
    said = ran("train", config, f"run.dir={tmp_path}/other", f"checkpoint.load={blocked}/step-00000012", code=2)
    assert "is after step 12" in said, "a copy is a checkpoint"
