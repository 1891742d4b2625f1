"""The loop as a user sees it: it goes on by itself, to the last bit, and refuses what would make it another run."""

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.run_directory import RunDirectory
from tests.launcher.tiny import Started, configuration, outcome_of, ran, run, start

LONG = {"steps": 40}


def records(directory: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says of the numbers: those that must not depend on time."""
    exact = ("step", "loss", "grad_norm", "learning_rate", "tokens", "samples", "batch_hash", "validation_loss")
    found = RunDirectory(directory / "run").metrics
    return [{key: record[key] for key in exact if key in record} for record in found]


def wait_for_step(started: Started, directory: Path, step: int) -> None:
    """Returns once the run has logged this step."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(record["step"] >= step for record in RunDirectory(directory / "run").metrics):
            return
        time.sleep(0.02)
    started.send(signal.SIGKILL)
    started.wait()
    pytest.fail(f"step {step} was not reached:\n{started.said()}")


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path, store: Path, ranks: int) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    sections = {"train": LONG, "evaluate": {"every_steps": 10, "batches": 2}}
    ran("train", configuration(whole, store, **sections), ranks=ranks)
    config = configuration(killed, store, **sections)
    started = start("train", config, ranks=ranks)
    wait_for_step(started, killed, 14)
    started.send(signal.SIGKILL)
    assert started.wait() == [-signal.SIGKILL] * ranks
    ran("train", config, ranks=ranks)
    assert records(killed) == records(whole)
    assert len(records(whole)) == LONG["steps"]
    attempts = list(RunDirectory(killed / "run").history)
    assert [attempt["from_step"] > 0 for attempt in attempts] == [False, True]


@pytest.mark.distributed
@pytest.mark.fault(
    number=10,
    fault="SIGTERM to one of two ranks",
    holds="both save the same step and end with 75",
    back_after="saved within a step; a job is requeued (5)",
)
def test_a_signal_saves_on_all_ranks_and_asks_to_be_requeued(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 1000}, checkpoint={"every_steps": 1000})
    started = start("train", config, ranks=2)
    wait_for_step(started, tmp_path, 3)
    started.processes, (second,) = started.processes[:1], started.processes[1:]
    alone = Started(processes=[second], output=started.output)
    alone.send(signal.SIGTERM)
    assert started.wait() == [75], started.said()
    assert alone.wait() == [75]
    outcome = outcome_of(tmp_path)
    assert outcome.exit_code == 75
    assert "SIGTERM" in outcome.message
    saved = RunDirectory(tmp_path / "run").checkpoints / f"step-{outcome.step:08d}"
    assert (saved / "manifest.json").is_file()
    assert records(tmp_path)[-1]["step"] == outcome.step


def test_an_interrupt_saves_too(tmp_path: Path, store: Path) -> None:
    started = start("train", configuration(tmp_path, store, train={"steps": 1000}))
    wait_for_step(started, tmp_path, 2)
    started.send(signal.SIGINT)
    assert started.wait() == [130]
    assert "the same command goes on" in started.said()


@pytest.mark.fault(
    number=14,
    fault="a second call on a run that is being written; then the writer is killed",
    holds="refused at once by the holder's name; the lock of the dead is taken over",
    back_after=1.0,
)
def test_a_second_writer_is_refused_and_told_who_holds_the_run(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 100_000}, checkpoint={"every_steps": 100_000})
    first = start("train", config)
    wait_for_step(first, tmp_path, 1)
    codes, said = run("train", config)
    first.send(signal.SIGKILL)
    pid = first.processes[0]
    first.wait()
    assert codes == [2]
    assert f"is being written by process {pid}" in said
    assert not (tmp_path / "run" / "outcome.json").exists(), "who was refused must not write to the run"
    ran("train", config, "train.steps=3")  # the lock of the dead is taken over


def test_a_finished_run_says_so(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 3})
    ran("train", config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    said = ran("train", config)
    assert "is finished: 3 steps" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.distributed
@pytest.mark.fault(
    number=21,
    fault="two ranks are killed, one goes on at another ZeRO stage",
    holds="the same batches, losses within 1e-5",
    back_after=2.3,
)
def test_another_layout_goes_on_where_the_run_stopped(tmp_path: Path, store: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for directory in (one, two):
        directory.mkdir()
    ran("train", configuration(one, store))
    config = configuration(two, store)
    started = start("train", config, ranks=2)
    wait_for_step(started, two, 4)
    started.send(signal.SIGKILL)
    started.wait()
    ran("train", config, "parallel.zero_stage=0")
    changes = list(RunDirectory(two / "run").history)[-1]["changes"]
    assert changes == {"parallel.zero_stage": [1, 0]}
    for mine, theirs in zip(records(two), records(one), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["batch_hash"] == theirs["batch_hash"]


def test_every_file_of_a_run_is_well_formed(tmp_path: Path, store: Path) -> None:
    ran("train", configuration(tmp_path, store, evaluate={"every_steps": 4, "batches": 1}))
    directory = RunDirectory(tmp_path / "run")
    record = list(directory.metrics)[-1]
    assert set(record) >= {
        "step", "loss", "tokens", "samples", "learning_rate", "grad_norm", "skipped_steps", "tokens_per_second",
        "mfu_causal", "mfu_full", "memory_bytes", "batch_hash", "validation_loss", "time_data_seconds",
        "time_save_seconds", "time_forward_backward_seconds", "time_communication_seconds", "time_optimizer_seconds",
    }  # fmt: skip
    assert record["tokens"] == record["samples"] * 32 == 12 * 4 * 32
    assert [event["event"] for event in directory.events] == ["started", "saved", "saved", "saved", "finished"]
    assert json.loads(directory.outcome.read_text())["step"] == 12
    state = json.loads((directory.checkpoints / "step-00000012" / "state.json").read_text())
    assert state["progress"]["step"] == 12
    assert state["loader"]["position"] == 48
    assert set(state["loader"]["ledger"]) == {"code", "prose"}
    assert record["tokens_by_source"] == state["loader"]["ledger"]
    assert sum(record["tokens_by_source"].values()) == record["tokens"]


def test_the_loss_falls(tmp_path: Path, store: Path) -> None:
    ran("train", configuration(tmp_path, store))
    losses = [record["loss"] for record in records(tmp_path)]
    assert losses[-1] < losses[0] - 1


def test_fp16_learns_as_fp32_does(tmp_path: Path, store: Path) -> None:
    for name in ("fp32", "fp16"):
        (tmp_path / name).mkdir()
        ran("train", configuration(tmp_path / name, store), f"precision={name}", ranks=2)
    halves, singles = (list(RunDirectory(tmp_path / name / "run").metrics) for name in ("fp16", "fp32"))
    for half, single in zip(halves, singles, strict=True):
        assert half["loss"] == pytest.approx(single["loss"], rel=0.02)
        assert half["skipped_steps"] == 0


def test_a_step_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, optimizer={"learning_rate": 1e30, "clip_norm": 0})
    said = ran("train", config, code=1)
    assert re.search(r"FloatingPointError: the .* of step \d+ (is|are) not finite", said)
    assert "go on from the newest checkpoint" in said
    outcome = outcome_of(tmp_path)
    assert outcome.exit_code == 1
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
