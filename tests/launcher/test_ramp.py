"""A ramp of batch sizes and a curriculum of lengths, by the command line: any layout, and stopped inside of both."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.run_directory import RunDirectory
from parallel.checkpoint.manifest import whole_steps
from tests.launcher.test_train import records
from tests.launcher.tiny import configuration, ran

pytestmark = pytest.mark.distributed

SECTIONS: dict[str, dict[str, Any]] = {
    "train": {
        "steps": None,
        "tokens": "2400",
        "global_batch_size": 12,
        "micro_batch_size": 2,
        "sequence_length": 32,
        "batch_size_ramp": [
            {"global_batch_size": 4, "until_step": 2},
            {"global_batch_size": 8, "until_tokens": "1K"},
        ],
    },
    "data": {"schedule": [{"from_step": 0, "sequence_length": 8}, {"from_step": 3, "sequence_length": 32}]},
    "checkpoint": {"every_steps": 1, "keep": 20},
}


def test_a_ramp_and_a_curriculum_are_the_same_in_every_layout_and_after_a_stop(tmp_path: Path, store: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    for directory, ranks in ((alone, 1), (two, 2)):
        directory.mkdir()
        data = {**SECTIONS["data"], "store": str(store)}
        config = configuration(directory, store, **{**SECTIONS, "data": data})
        ran("train", config, ranks=ranks)
    found, same = records(alone), records(two)
    # 4 x 32 twice, 8 x 32 until 1,024 are passed (three times), 12 x 32 until 2,400 are passed (four times).
    assert [record["tokens"] for record in found] == [128, 256, 512, 768, 1024, 1408, 1792, 2176, 2560]
    assert [record["batch_hash"] for record in same] == [record["batch_hash"] for record in found]
    assert [record["loss"] for record in same] == pytest.approx([record["loss"] for record in found], rel=1e-5)
    state = json.loads((alone / "run/checkpoints/step-00000009/state.json").read_text())
    assert state["loader"]["position"] == state["progress"]["samples"] == 2560 // 32
    for step in (1, 4):
        copy = tmp_path / f"after-{step}" / "run"
        shutil.copytree(alone / "run", copy, ignore=lambda _, names: {"outcome.json"} & set(names))
        for later, path in whole_steps(copy / "checkpoints").items():
            if later > step:
                shutil.rmtree(path)
        ran("train", alone / "config.yaml", f"run.dir={copy}")
        assert list(RunDirectory(copy).history)[-1]["from_step"] == step
        assert records(copy.parent) == found


def test_a_ramp_that_makes_no_sense_is_refused(tmp_path: Path, store: Path) -> None:
    ramp = [
        {"global_batch_size": 2, "until_step": 4, "until_tokens": "1K"},
        {"global_batch_size": 1, "until_step": 3},
        {"global_batch_size": 4, "until_step": 3},
        {"global_batch_size": 4, "until_tokens": "many"},
    ]
    config = configuration(tmp_path, store, train={"batch_size_ramp": ramp})
    said = ran("train", config, code=2)
    assert "train.batch_size_ramp.0.until_step is 4: expected exactly one of until_step and until_tokens" in said
    assert "train.batch_size_ramp.2.until_step is 3: expected a step after 3" in said
    assert "train.batch_size_ramp.3.until_tokens is 'many': expected a number such as 5000" in said
    config = configuration(tmp_path, store, train={"batch_size_ramp": ramp[1:2], "micro_batch_size": 2})
    said = ran("train", config, code=2)
    assert "train.batch_size_ramp.0.global_batch_size is 1: expected at least micro_batch_size" in said
