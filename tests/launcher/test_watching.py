"""What is looked at while a run trains: profile, samples, TensorBoard, a debugger."""

import gzip
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.evaluation.samples import continued
from launcher.run_directory import RunDirectory
from launcher.verify.measure import Case, engine_of
from launcher.verify.world import run_world
from tests.distributed.layouts import tiny
from tests.launcher.tiny import configuration, ran, start

PROFILE = {"profile_start_step": 3, "profile_stop_step": 4, "profile_ranks": [1]}


@pytest.mark.distributed
def test_a_run_shows_its_steps(tmp_path: Path, store: Path) -> None:
    config = configuration(
        tmp_path,
        store,
        train={"steps": 21, "log_every_steps": 2, **PROFILE},
        parallel={"tensor": 2},
        evaluate={"every_steps": 12, "batches": 1, "prompts": ["iron ore"], "sample_tokens": 3},
        tracking={"tensorboard": True, "wandb": {"mode": "disabled"}},
    )
    said = ran("train", config, ranks=2)
    directory = RunDirectory(tmp_path / "run")
    assert said.count("after step 20: a step takes") == 1
    found = json.loads(directory.prediction.read_text())
    computed, measured = found["predicted"], found["measured"]
    assert computed["step_seconds"] == pytest.approx(sum(computed["seconds"].values()))
    assert computed["memory_bytes"] == sum(computed["bytes"].values())
    assert computed["memory_bytes"] == pytest.approx(measured["memory_bytes"], rel=0.3)
    assert computed["hardware"] == "this CPU, measured"
    taken = [record for record in directory.metrics if 1 < record["step"] <= 20]

    tokens = [128, *[256] * 9]  # of a record; the one of step 12 is an evaluation too
    seconds = sum(count / record["tokens_per_second"] for count, record in zip(tokens, taken, strict=True))
    assert measured["step_seconds"] == pytest.approx(seconds / 19)
    with gzip.open(directory.profile / "rank-00001.json.gz") as file:
        assert any("mm" in event.get("name", "") for event in json.load(file)["traceEvents"])
    assert "dearest operations by time, steps 3 to 4" in (directory.profile / "rank-00001.txt").read_text()
    assert not (directory.profile / "rank-00000.txt").exists()
    samples = list(directory.samples)
    assert [(sample["checkpoint"], sample["prompt"]) for sample in samples] == [
        ("step 12", "iron ore"),
        ("step 21", "iron ore"),
    ]
    assert all(sample["continuation"] for sample in samples)
    curves = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = curves.EventAccumulator(str(directory.tensorboard))
    read.Reload()
    logged = {record["step"]: record["loss"] for record in directory.metrics}
    drawn = {point.step: point.value for point in read.Scalars("loss")}
    assert drawn == pytest.approx(logged)


@pytest.mark.distributed
def test_a_debugger_on_one_rank(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 3})
    started = start("train", config, "--debug-rank", "1", ranks=2)
    try:
        deadline, port = time.monotonic() + 60, None
        while port is None and time.monotonic() < deadline:
            port = re.search(r"rank 1 waits for a debugger: nc 127.0.0.1 (\d+)", started.said())
            time.sleep(0.1)
        assert port is not None, started.said()
        with socket.create_connection(("127.0.0.1", int(port[1])), timeout=60) as connection:
            talk = connection.makefile("rw")
            talk.write("p ranks.rank, parts.progress.step\nc\n")
            talk.flush()
            assert "(1, 0)" in talk.read()
    finally:
        codes = started.wait()
    assert codes == [0, 0], started.said()
    assert list(RunDirectory(tmp_path / "run").metrics)[-1]["step"] == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"profile_stop_step": 3}}, "train.profile_stop_step is 3: expected null without"),
        (
            {"train": {"profile_start_step": 5, "profile_stop_step": 3}},
            "at least train.profile_start_step = 5",
        ),
        ({"train": {"profile_ranks": [4]}}, "expected ranks from 0 to 0"),
        ({"evaluate": {"prompts": ["x"]}}, "expected none without evaluate.every_steps"),
        ({"evaluate": {"prompts": ["x"], "every_steps": 2}, "parallel": {"pipeline": 2}}, "none with a pipeline"),
    ],
    ids=str,
)
def test_mistakes_are_told(tmp_path: Path, store: Path, change: dict[str, dict[str, object]], said: str) -> None:
    told = ran("train", configuration(tmp_path, store, **change), code=2)
    assert said in told


BEGUN = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]


def texts(case: Case, begun: list[list[int]]) -> list[list[int]]:
    engine = engine_of(case)
    engine.updater.module.train(False)
    return continued(engine, begun, tokens=14, window=16)  # longer than the window at the end


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"zero_stage": 3}], ids=str)
def test_the_live_model_says_the_same_in_every_layout(layout: dict[str, Any]) -> None:
    one = tiny()
    alone = [run_world(texts, 1, one, [row])[0][0] for row in BEGUN]
    assert len({tuple(row) for row in alone}) == 3
    assert run_world(texts, 2, tiny(2, **layout), BEGUN) == [alone, alone]
