"""`bloomery checkpoint list | inspect | check | diff | prune`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoints import compare, describe
from launcher.cli import main
from launcher.run_directory import Lock, RunDirectory
from parallel.checkpoint.manifest import whole_steps
from parallel.checkpoint.stream import StoredTensors
from tests.launcher.tiny import configuration, ran, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A run saved after 4, 8 and 12 steps, evaluated every four, by two ranks."""
    directory = tmp_path_factory.mktemp("finished")
    config = configuration(
        directory,
        store,
        evaluate={"every_steps": 4, "batches": 1},
        checkpoint={"every_steps": 4, "keep": 2, "keep_every_steps": 4, "keep_best": 1},
        parallel={"tensor": 2},
    )
    ran("train", config, ranks=2)
    return directory / "run"


@pytest.fixture
def copy(tmp_path: Path, finished: Path) -> Path:
    """A copy that may be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def asked(directory: Path, *words: str) -> Any:
    """What `bloomery checkpoint WORDS --json` wrote."""
    answer = directory / "answer.json"
    ran("checkpoint", *words, "--json", answer)
    return json.loads(answer.read_text())


def test_list_says_what_there_is_and_why_it_stays(
    tmp_path: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "checkpoints/step-00000008/manifest.json").write_text("{")
    answer = tmp_path / "answer.json"
    assert main(["checkpoint", "list", str(copy), "--json", str(answer)]) == 0
    said = capsys.readouterr().out
    assert "every 4" in said
    assert "not whole" in said
    first, second, third = json.loads(answer.read_text())
    assert second == {"name": "step-00000008", "whole": False}
    assert first["step"] == 4
    assert first["tokens"] == 4 * 4 * 32
    assert first["stays"] == ["newest", "every 4"]
    assert third["stays"][0] == "newest"
    assert third["metrics"].keys() == {"loss", "validation_loss"}
    assert third["bytes"] > 100_000
    shutil.rmtree(copy / "checkpoints")
    assert main(["checkpoint", "list", str(copy)]) == 0
    assert "has no checkpoint" in capsys.readouterr().out


def test_check_reads_every_file_of_every_step(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "check", str(copy)]) == 0
    assert capsys.readouterr().out.count("is whole") == 3
    for step, name in ((4, "state.json"), (8, "manifest.json"), (12, "tensors/__1_0.distcp")):
        path = copy / f"checkpoints/step-{step:08d}" / name
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    (copy / "checkpoints/step-00000012/tensors/.metadata").unlink()
    assert main(["checkpoint", "check", str(copy)]) == 1
    said = capsys.readouterr().out
    for name in ("00000004/state.json is damaged", "00000008/manifest.json is damaged",
                 "00000012/tensors/__1_0.distcp is damaged", "00000012/tensors/.metadata is missing"):  # fmt: skip
        assert name in said
    assert main(["checkpoint", "check", f"{copy}@4"]) == 1
    assert main(["checkpoint", "check", str(copy / "checkpoints/step-00000008")]) == 1
    assert main(["checkpoint", "check", "nowhere"]) == 2
    assert "nowhere is not a run" in capsys.readouterr().err


def test_prune_takes_what_no_rule_keeps(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = RunDirectory(copy).checkpoints
    (checkpoints / ".attempt-dead-00000016/tensors").mkdir(parents=True)
    assert main(["checkpoint", "prune", str(copy)]) == 0
    assert list(whole_steps(checkpoints)) == [4, 8, 12], "the run's own rules keep all"
    assert not list(checkpoints.glob(".attempt-*"))
    every = ["checkpoint", "prune", str(copy), "--keep", "1", "--keep-every-steps", "8", "--keep-best", "0"]
    assert main([*every, "--dry-run"]) == 0
    assert list(whole_steps(checkpoints)) == [4, 8, 12]
    assert "would remove" in capsys.readouterr().out
    assert main(every) == 0
    assert list(whole_steps(checkpoints)) == [8, 12]
    assert "1 of 3 checkpoints" in capsys.readouterr().out


def test_prune_leaves_a_run_alone_that_is_being_written(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Lock(copy / "lock")
    lock.take("somebody")
    assert main(["checkpoint", "prune", str(copy), "--keep", "1", "--keep-every-steps", "100"]) == 2
    lock.close()
    assert "is being written by process" in capsys.readouterr().err
    assert list(whole_steps(copy / "checkpoints")) == [4, 8, 12]


def test_inspect_knows_the_tensors_whatever_cut_them(tmp_path: Path, finished: Path) -> None:
    found = asked(tmp_path, "inspect", str(finished))
    assert found["step"] == 12
    assert found["layout"]["tensor"] == 2
    assert found["state"]["progress"]["tokens"] == 12 * 4 * 32
    path = finished / "checkpoints/step-00000012"
    stored = StoredTensors(path)
    assert found["tensors"].keys() == stored.shapes.keys()
    name = "weight.decoder.layers.0.mlp.linear_fc1.weight"
    assert found["tensors"][name]["shape"] == [96, 32], "whole, not a half of it"
    assert found["tensors"][name]["norm"] == pytest.approx(float(stored.read(name).norm()), rel=1e-6)
    quick = describe(path, norms=False)
    assert "norm" not in quick["tensors"][name]
    _, said = run("checkpoint", "inspect", path)
    assert "decoder.layers.0.mlp.linear_fc1.weight 96x32" in " ".join(said.split())
    assert "norm of exp_avg_sq" in said


def test_diff_finds_what_differs_and_nothing_else(tmp_path: Path, store: Path, finished: Path) -> None:
    other = configuration(tmp_path, store, parallel={"zero_stage": 0}, model={"layers": 3}, train={"steps": 4})
    ran("train", other)
    same = asked(tmp_path, "diff", f"{finished}@8", str(finished / "checkpoints/step-00000008"))
    assert (same["facts"], same["tensors"], same["only_a"], same["shapes"]) == ({}, {}, [], {})
    assert same["compared"] == 45
    later = asked(tmp_path, "diff", f"{finished}@8", f"{finished}@12")
    assert later["facts"]["step"] == [8, 12]
    assert "layout.tensor" not in later["facts"]
    assert len(later["tensors"]) == 45
    name = "weight.embedding.word_embeddings.weight"
    a, b = (StoredTensors(finished / f"checkpoints/step-{step:08d}").read(name) for step in (8, 12))
    assert later["tensors"][name]["largest"] == pytest.approx(float((a - b).abs().max()))
    assert later["tensors"][name]["elements"] == int((a != b).sum())
    models = asked(tmp_path, "diff", str(finished), str(tmp_path / "run"))
    assert models["facts"]["layout.tensor"] == [2, 1]
    assert models["facts"]["config.model.layers"] == [2, 3]
    assert not models["only_a"]
    assert all(".layers.2." in name for name in models["only_b"])
    quick = compare(finished / "checkpoints/step-00000008", finished / "checkpoints/step-00000012", values=False)
    assert quick["compared"] == 0


def test_a_checkpoint_outside_a_run_can_be_looked_at(tmp_path: Path, finished: Path) -> None:
    alone = shutil.copytree(finished / "checkpoints/step-00000008", tmp_path / "step-00000008")
    assert asked(tmp_path, "inspect", str(alone))["step"] == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json", "step-00000008"]
