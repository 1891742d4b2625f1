"""Averages of weights by the command line: over the steps of a run, and over checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launcher.places import find_checkpoint
from launcher.verbs.conversion import average_main, export_main
from launcher.verify.world import run_world
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError
from tests.launcher.test_conversion import in_process
from tests.launcher.test_train import records
from tests.launcher.tiny import configuration, ran

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """The directory of a run of twelve steps that keeps an average."""
    directory = tmp_path_factory.mktemp("averaged")
    config = configuration(directory, store, optimizer={"learning_rate": 1e-2, "average_decay": 0.8})
    ran("train", config, ranks=2)
    return directory


def stored(run_directory: Path, step: int) -> dict[str, torch.Tensor]:
    def read() -> dict[str, torch.Tensor]:
        tensors = StoredTensors(find_checkpoint(f"{run_directory}@{step}").path)
        return {name: tensors.read(name) for name in tensors.shapes if name.startswith(("weight.", "average."))}

    return run_world(read, 1)[0]


def test_an_average_is_kept_resumed_and_exported(averaged: Path, tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, optimizer={"learning_rate": 1e-2, "average_decay": 0.8})
    ran("train", config, f"checkpoint.load={averaged / 'run'}@4", "parallel.tensor=2", ranks=2)
    assert records(tmp_path)[-1]["loss"] == pytest.approx(records(averaged)[-1]["loss"], rel=1e-4)
    ours, theirs = stored(averaged / "run", 12), stored(tmp_path / "run", 12)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=2e-3, atol=2e-4)
        assert name.startswith("weight.") or not torch.equal(tensor, ours[name.replace("average.", "weight.")])
    export = [averaged / "run", "--output", tmp_path / "mean", "--average"]
    assert in_process(export_main, *export) == 0
    exported = load_file(tmp_path / "mean/model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(exported, ours["average.embedding.word_embeddings.weight"])


def test_a_run_without_an_average_has_none_to_load_or_to_export(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 4})
    ran("train", config)
    with pytest.raises(UserError, match="keeps no average of the weights"):
        in_process(export_main, tmp_path / "run", "--output", tmp_path / "mean", "--average")
    more = ("train.steps=6", "optimizer.average_decay=0.9", f"run.dir={tmp_path / 'more'}")
    said = ran("train", config, *more, f"checkpoint.load={tmp_path / 'run'}", code=2)
    assert "holds no state of average" in said


def test_the_mean_of_checkpoints_is_a_checkpoint(averaged: Path, tmp_path: Path) -> None:
    names = [f"{averaged / 'run'}@{step}" for step in (4, 8, 12)]
    ran("checkpoint", "average", *names, "--output", tmp_path / "mean")
    parts = [stored(averaged / "run", step) for step in (4, 8, 12)]
    found = stored(tmp_path / "mean", 12)
    assert {name for name in parts[0] if name.startswith("weight.")} == set(found)
    for name, tensor in found.items():
        assert torch.equal(tensor, (sum(part[name].double() for part in parts) / 3).float())
    ran("evaluate", tmp_path / "mean")
    ran("checkpoint", "check", tmp_path / "mean")


def test_what_has_no_mean_is_refused(averaged: Path, tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 4}, model={"layers": 1})
    said = ran("train", config)
    said = ran("checkpoint", "average", averaged / "run", tmp_path / "run", "--output", tmp_path / "mean", code=2)
    assert "only checkpoints of one model have a mean" in said
    assert not list(tmp_path.glob("*mean*"))
    with pytest.raises(UserError, match="alone has no mean"):
        average_main([str(averaged / "run"), "--output", str(tmp_path / "mean")])


def test_a_deterministic_run_has_the_same_bits_each_time(tmp_path: Path, store: Path) -> None:
    """Metrics and every tensor of the last checkpoint, with dropout, on two ranks."""
    both = []
    for name in ("first", "second"):
        directory = tmp_path / name
        directory.mkdir()
        train = {"deterministic": True, "steps": 6, "global_batch_size": 4, "sequence_length": 32, "log_every_steps": 1}
        model = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 48, "dropout": 0.1}
        ran("train", configuration(directory, store, train=train, model=model), ranks=2)
        both.append((records(directory), stored(directory / "run", 6)))
    (first, tensors), (second, others) = both
    assert first == second
    assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
