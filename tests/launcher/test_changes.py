"""What may change between two attempts at a run, what is refused, and what is allowed by its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher import changes
from launcher.run_directory import RunDirectory
from tests.launcher.test_train import records
from tests.launcher.tiny import configuration, ran


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """The directory of a run of twelve steps that was saved after eight and not finished; copy it."""
    directory = tmp_path_factory.mktemp("stopped")
    ran("train", configuration(directory, store))
    shutil.rmtree(directory / "run/checkpoints/step-00000012")
    (directory / "run/outcome.json").unlink()
    return directory


@pytest.fixture
def config(tmp_path: Path, store: Path, stopped: Path) -> Path:
    """The configuration of a copy of that run in `tmp_path`."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    found = RunDirectory(tmp_path / "run")
    found.config.write_text(found.config.read_text().replace(str(stopped), str(tmp_path)))
    return configuration(tmp_path, store)


def _history(directory: Path) -> dict[str, Any]:
    return list(RunDirectory(directory / "run").history)[-1]


@pytest.mark.fault(
    number=25,
    fault="learning rate, length and seed differ from the last attempt's",
    holds="refused with each difference and how to allow it",
    back_after="refused, until the changes are allowed",
)
def test_another_configuration_is_refused_with_its_differences(tmp_path: Path, config: Path) -> None:
    before = (tmp_path / "run/history.jsonl").read_bytes()
    said = ran("train", config, "optimizer.learning_rate=0.5", "train.steps=16", "run.seed=7", code=2)
    assert f"optimizer.learning_rate is 0.5: expected 0.01 as in {tmp_path}/run, a new run.name, or " in said
    assert "checkpoint.allow_changes=[optimizer.learning_rate]" in said
    assert "train.steps is 16: expected 12" in said
    assert "another length is another run" in said
    assert "run.seed is 7: expected 1234" in said
    assert "allow_changes=[run.seed]" not in said
    assert (tmp_path / "run/history.jsonl").read_bytes() == before


def test_what_changes_no_number_may_change(tmp_path: Path, stopped: Path, config: Path) -> None:
    said = ran("train", config, "train.log_every_steps=1", "checkpoint.keep=2", "train.micro_batch_size=4")
    assert "changed since the last attempt: checkpoint.keep from 8 to 2" in said
    assert _history(tmp_path)["changes"] == {"checkpoint.keep": [8, 2], "train.micro_batch_size": [2, 4]}
    for mine, theirs in zip(records(tmp_path), records(stopped), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_change_that_is_allowed_by_its_name_is_taken_and_kept(tmp_path: Path, stopped: Path, config: Path) -> None:
    asked = "optimizer.learning_rate=0.02", "train.global_batch_size=2"
    said = ran("train", config, *asked, "checkpoint.allow_changes=[optimizer.learning_rate]", code=2)
    assert "global_batch_size" in said
    assert "learning_rate" not in said
    said = ran("train", config, *asked, "checkpoint.allow_changes=[optimizer,train.global_batch_size]")
    assert "changed since the last attempt: optimizer.learning_rate from 0.01 to 0.02" in said
    assert _history(tmp_path)["changes"]["train.global_batch_size"] == [4, 2]
    mine, theirs = records(tmp_path), records(stopped)
    assert mine[:8] == theirs[:8]
    assert mine[8]["samples"] == theirs[7]["samples"] + 2, "what was seen is still counted"
    assert mine[8]["learning_rate"] > theirs[8]["learning_rate"]


@pytest.mark.parametrize(
    ("allowed", "told"),
    [
        ("optimizer.learning_rat", "expected optimizer.learning_rate, if that was meant"),
        ("data.mixture", "does not decide the order of the samples"),
        ("run.seed", "does not decide the order of the samples"),
    ],
)
def test_a_name_that_allows_nothing_is_refused(config: Path, allowed: str, told: str) -> None:
    said = ran("train", config, f"checkpoint.allow_changes=[{allowed}]", code=2)
    assert told in said


@pytest.mark.fault(
    number=25,
    fault="source files differ from the last attempt's",
    holds="refused by the files' names; allowed by checkpoint.allow_changes and kept in the history",
    back_after="refused, until the changes are allowed",
)
def test_other_code_is_refused_and_its_files_are_named(tmp_path: Path, stopped: Path, config: Path) -> None:
    """As if the last attempt had had another engine and one module less."""
    found = RunDirectory(tmp_path / "run")
    recorded = found.recorded_code()
    assert recorded == changes.code_files()
    assert {"parallel/engine.py", "model/build.py", "data_pipeline/loader.py", "launcher/train.py"} <= set(recorded)
    recorded["parallel/engine.py"] = "0" * 32
    del recorded["model/build.py"]
    found.code.write_text(json.dumps(recorded))
    said = ran("train", config, code=2)
    assert "code is 'changed in model/build.py, parallel/engine.py'" in said
    said = ran("train", config, "checkpoint.allow_changes=[code]")
    assert "changed since the last attempt: the code, in model/build.py, parallel/engine.py" in said
    assert _history(tmp_path)["changes"]["code"] == [
        changes.code_hash(recorded),
        changes.code_hash(changes.code_files()),
    ]
    assert found.recorded_code() == changes.code_files()
    assert records(tmp_path) == records(stopped)
    found.code.write_text(json.dumps(recorded))
    ran("train", config)  # a finished run goes on with no code at all


def test_other_packages_are_refused(tmp_path: Path, config: Path) -> None:
    found = RunDirectory(tmp_path / "run")
    (attempt,) = found.history
    attempt["versions"]["torch"] = "2.10.0"
    found.history.path.write_text(json.dumps(attempt) + "\n")
    said = ran("train", config, code=2)
    assert "versions.torch is '2.11.0" in said
    assert "expected '2.10.0'" in said
    ran("train", config, "checkpoint.allow_changes=[versions]")
    assert _history(tmp_path)["changes"]["versions.torch"][0] == "2.10.0"


def test_before_the_first_checkpoint_anything_may_change(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, optimizer={"learning_rate": 1e30, "clip_norm": 0})
    ran("train", config, code=1)  # nothing was saved
    config = configuration(tmp_path, store, train={"steps": 3})
    ran("train", config)
    assert _history(tmp_path)["changes"]["train.steps"] == [12, 3]
