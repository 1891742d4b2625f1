"""Weights & Biases offline, read back from its own file and sent by its own `sync`; against a server that drops every
connection; its failure leaves the run alone; secrets stay out."""

import json
import logging
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

import launcher.evaluation.tasks  # so that forked ranks find it imported
from data_pipeline.batch_sizes import BatchSizes
from launcher import weights_and_biases
from launcher.config import WandbConfig, WandbMode
from launcher.progress import Progress
from launcher.run_directory import RunDirectory
from launcher.tracking import Tracker
from launcher.weights_and_biases import WeightsAndBiases
from tests.launcher.tiny import configuration, environment, ran, start
from tests.launcher.wandb_server import serving

assert launcher.evaluation.tasks

_HEADER_BYTES, _BLOCK_BYTES = 7, 32768
_FULL, _LAST = 1, 4


def messages(content: bytes) -> Iterator[bytes]:
    """The messages of a .wandb file: a log in LevelDB's format (blocks of 32 KiB; checksum, length, kind, data)."""
    assert content.startswith(b":W&B")
    position, message = _HEADER_BYTES, b""
    while position < len(content):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += _HEADER_BYTES
        message += content[position : position + length]
        position += length
        if kind in (_FULL, _LAST):
            yield message
            message = b""


def read_back(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The history rows and the facts of the run in an offline file."""
    rows: list[dict[str, Any]] = []
    kept: list[str] = []
    alerts: list[str] = []
    summary: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    for data in messages(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        if record.HasField("run"):
            facts = {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
        if record.HasField("artifact"):
            kept.append(record.artifact.type)
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        if record.HasField("alert"):
            alerts.append(f"{record.alert.level} {record.alert.title}")
    return rows, {**facts, "artifacts": kept, "alerts": alerts, "summary": summary}


KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> Iterator[None]:
    """The library keeps one process beside ours, whose attempts to reach a server would outlive a test."""
    yield
    weights_and_biases.let_go()


def connected(tmp_path: Path, mode: WandbMode) -> WeightsAndBiases:
    return WeightsAndBiases(WandbConfig(mode=mode), run=tmp_path, store=tmp_path, name="x", shown={})


def progress() -> Progress:
    return Progress(batch_sizes=BatchSizes(1), total_steps=9, sequence_length=1)


@pytest.mark.slow
def test_an_offline_run_is_one_run_over_restarts_and_syncs_without_a_step_twice(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / "choose.yaml").write_text(
        "{name: choose, kind: multiple_choice, data: choose.jsonl, choices: [iron, ore]}"
    )
    (tmp_path / "choose.jsonl").write_text('{"text": "air", "label": "ore"}\n')
    tracking = {"wandb": {"mode": "offline", "project": "tests"}}
    tasks = {"tasks": {"files": [str(tmp_path / "choose.yaml")], "every_steps": 8}}
    config = configuration(tmp_path, store, tracking=tracking, checkpoint={"every_steps": 4, "keep": 9}, evaluate=tasks)
    directory = RunDirectory(tmp_path / "run")
    killed = start("train", config, faults={0: "train.step:7"})
    assert killed.wait() == [-signal.SIGKILL], killed.said()
    known = {"time": 0.0, "attempt": "x", "step": 7}
    directory.events.append({"event": "anomaly", **known, "kind": "loss_spike", "policy": "tell", "cause": "9 of 2"})
    directory.events.append({"event": "hung", **known, "message": "rank 3 does not answer"})
    ran("train", config, "train.steps=14", "checkpoint.allow_changes=[train.steps,optimizer]")
    files = sorted((directory.path / "wandb").glob("offline-run-*/*.wandb"))
    (file,) = files
    rows, facts = read_back(file)
    assert facts["id"] == (directory.path / "wandb" / "id").read_text()
    assert (facts["project"], facts["name"]) == ("tests", "tiny")
    assert sorted({*facts["artifacts"]}) == ["code", "config", "data", "layout", "tokenizer"]
    assert [alert.split()[-1] for alert in facts["alerts"]] == ["loss_spike", "hung", "resumed"]
    assert [row["_step"] for row in rows] == list(range(1, 15))
    assert [row["loss"] for row in rows] == [record["loss"] for record in directory.metrics]
    assert [row["_step"] for row in rows if "tasks/choose/accuracy" in row] == [8, 14]
    assert facts["summary"]["tasks/choose/step"] == 14
    ran("evaluate", f"{directory.path}@8", "--task", tmp_path / "choose.yaml")
    first, _, line = directory.tasks
    files = sorted((directory.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    rows, asked = read_back(files[1])
    assert (rows, asked["id"], asked["alerts"], asked["artifacts"]) == ([], facts["id"], [], [])
    assert asked["summary"]["tasks/choose/accuracy"] == line["accuracy"]
    assert asked["summary"]["tasks/choose/step"] == 8
    assert first == {key: value for key, value in line.items() if key != "checksum"}
    for file in directory.path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    with serving() as server:
        reached = {**environment(), "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
        command = [str(Path(sys.executable).with_name("wandb")), "sync", *(str(file.parent) for file in files)]
        done = subprocess.run(command, env=reached, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert set(server.ids) == {facts["id"]}
        assert sorted(row["_step"] for row in server.history if "loss" in row) == list(range(1, 15))


def test_a_server_that_drops_every_connection_leaves_the_attempt_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as server:
        server.drops = True
        monkeypatch.setattr(weights_and_biases, "_KEY_SECONDS", 2)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        started = time.monotonic()
        remote = connected(tmp_path, WandbMode.online)
        remote.log(progress(), {"step": 3, "loss": 1.5})
        remote.close(0)
        assert time.monotonic() - started < 60
    assert [record.levelname for record in caplog.records if record.name.startswith("launcher")] == ["WARNING"]
    assert "is out of reach" in caplog.text
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows, _ = read_back(file)
    assert [row["loss"] for row in rows] == [1.5]


def test_a_server_that_goes_away_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weights_and_biases, "_END_SECONDS", 2)
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        remote = connected(tmp_path, WandbMode.online)
        remote.log(progress(), {"step": 1, "loss": 1.0})
        server.drops = True
        started = time.monotonic()
        remote.log(progress(), {"step": 2, "loss": 0.5})
        assert time.monotonic() - started < 5, "a step waited for the server"
        remote.close(0)
        assert time.monotonic() - started < 40
        wandb.teardown()  # as at the end of a process
        assert time.monotonic() - started < 60
        (file,) = (tmp_path / "wandb").glob("run-*/*.wandb")
        assert [row["loss"] for row in read_back(file)[0]] == [1.0, 0.5], "what did not arrive is not lost"
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def records(*steps: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1 / step, "tokens_by_source": {"code": step}} for step in steps]


def attempt(run: Path, mode: WandbMode, logged: list[dict[str, Any]]) -> WeightsAndBiases:
    """What an attempt hands over, by the tracker that everybody uses; not ended yet."""
    remote = connected(run, mode)
    tracker = Tracker(metrics=RunDirectory(run).metrics, events=run / "events.jsonl", sinks=[remote])
    for record in logged:
        tracker.log(progress(), record)
    return remote


def test_every_step_and_alert_arrives_once_over_attempts_of_all_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text('{"event": "saved", "step": 1}\n{"event": "hung", "step": 2, "message": "rank 3"}\n{"event": "to')
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        attempt(tmp_path, WandbMode.online, records(1, 2, 3)).close(0)
        attempt(tmp_path, WandbMode.offline, records(4)).close(0)
        attempt(tmp_path, WandbMode.offline, records(5))  # it is killed
        wandb.teardown()
        server.drops_next = 2  # the client tries again
        attempt(tmp_path, WandbMode.online, records(5, 6)).close(0)
        assert server.drops_next == 0
        assert [row["_step"] for row in server.history] == [1, 2, 3, 4, 5, 6]
        assert server.history[3]["tokens_by_source/code"] == 4
        assert server.alerts == ["ERROR x: hung: step 2, message rank 3"]
        assert len(set(server.ids)) == 1
    assert not list((tmp_path / "wandb").glob("offline-*")), "they would be sent again"


def test_a_failure_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(weights_and_biases.wandb, "init", fail)
    remote = connected(tmp_path, WandbMode.offline)
    remote.log(progress(), {"step": 1, "loss": 1.0})
    remote.close(0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no space left on device" in caplog.text
    assert "metrics.jsonl has everything" in caplog.text
