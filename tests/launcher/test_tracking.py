"""Weights & Biases offline, read back from its own file; its failure leaves the run alone; secrets stay out."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

from launcher import tracking
from launcher.config import WandbConfig, WandbMode
from launcher.run_directory import RunDirectory
from launcher.tracking import WeightsAndBiases
from tests.launcher.tiny import bloomery, configuration

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
    facts: dict[str, Any] = {}
    for data in messages(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
        if record.HasField("run"):
            facts = {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
    return rows, facts


@pytest.mark.slow
def test_an_offline_run_has_every_record_and_one_id_over_restarts(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    config = configuration(tmp_path, store, tracking={"wandb": {"mode": "offline", "project": "tests"}})
    done = bloomery("train", config)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "outcome.json").unlink()
    assert bloomery("train", config).returncode == 0
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    rows, facts = read_back(files[0])
    metrics = list(RunDirectory(tmp_path / "run").metrics)
    assert [row["loss"] for row in rows] == [record["loss"] for record in metrics]
    assert facts == {"id": (tmp_path / "run" / "wandb" / "id").read_text(), "project": "tests", "name": "tiny"}
    assert read_back(files[1])[1]["id"] == facts["id"]
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"0123456789abcdef0123456789" not in file.read_bytes(), file


def test_a_failure_is_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(tracking.wandb, "init", fail)
    remote = WeightsAndBiases(WandbConfig(mode=WandbMode.offline), run=tmp_path, name="x", shown={})
    remote.log({"step": 1, "loss": 1.0})
    remote.close(0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no space left on device" in caplog.text
    assert "metrics.jsonl has everything" in caplog.text
