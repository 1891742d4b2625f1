"""The command line: verbs, exit codes, one sentence for a user's mistake and a stack trace for ours."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import cli
from launcher.verbs.train import ranks_to_start, split
from launcher.work import Ranks, from_environment
from parallel.common.errors import UserError
from tests.launcher.tiny import bloomery, command, configuration, environment


def test_help_teaches_every_verb_and_imports_no_torch() -> None:
    code = "import sys; from launcher.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment(), text=True, capture_output=True, check=True
    )
    for verb in cli.VERBS:
        assert f"\n  {verb}" in done.stdout
    assert "bloomery train      configs/quickstart.yaml" in done.stdout


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "data"])
def test_the_quick_half_of_a_verb_imports_no_torch(verb: str) -> None:
    code = (
        "import sys, importlib; from launcher.cli import VERBS\n"
        f"importlib.import_module(VERBS[{verb!r}].module)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], env=environment(), check=True)


@pytest.mark.parametrize("arguments", [["--help"], ["help"], ["-h"]])
def test_help_is_a_success(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert "quickstart" in capsys.readouterr().out


def test_no_verb_shows_the_help_and_is_a_mistake() -> None:
    assert cli.main([]) == 2


def test_an_unknown_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["train", "run.name=x", "train.stepz=1"], "did you mean 'steps'?"),
        (["evaluate", "nothing"], "nothing is not a run"),
        (["generate", "nothing", "--prompt", "x"], "nothing is not a run"),
        (["report", "nothing"], "nothing is not a run"),
        (["quickstart", "--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_a_missing_store_names_the_command_that_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(configuration(tmp_path, tmp_path / "nowhere"))]) == 2
    assert "bloomery data build" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_several_problems_stand_below_each_other(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(configuration(tmp_path, store)), "model.kv_heads=3", "run.name=a b"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "The configuration needs a change:"
    assert len(lines) == 3


def test_print_config_shows_every_value_and_loads_again(tmp_path: Path, store: Path) -> None:
    done = bloomery("train", configuration(tmp_path, store), "train.steps=7", "--print-config")
    assert done.returncode == 0, done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert bloomery("train", tmp_path / "again.yaml", "--print-config").stdout == done.stdout
    assert "steps: 7" in done.stdout


def test_our_own_mistake_keeps_its_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupt)
    assert cli.main(["train"]) == 130


def test_python_without_arguments_is_the_same_program() -> None:
    done = subprocess.run(command("--help"), env=environment(), text=True, capture_output=True, check=True)
    assert done.stdout == cli.help_text() + "\n"


def test_files_and_overrides_are_told_apart() -> None:
    assert split(["a.yaml", "train.steps=3", "dir/a=b.yaml"]) == (["a.yaml", "dir/a=b.yaml"], ["train.steps=3"])


def test_ranks_come_from_torchrun_or_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert from_environment().rendezvous == "alone"
    step = {"STEP_NUM_TASKS": "4", "PROCID": "3", "LOCALID": "1", "STEP_NODELIST": "node[07-08,11],x", "JOB_ID": "42"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    ranks = from_environment()
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.rendezvous) == (3, 4, 1, "srun")
    assert os.environ["MASTER_ADDR"] == "node07"
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert (from_environment().rank, from_environment().rendezvous) == (1, "torchrun")


def test_ranks_are_not_started_twice() -> None:
    under = Ranks(rank=0, world_size=2, local_rank=0, rendezvous="torchrun", attempt="a")
    assert ranks_to_start(under, None) == 2
    assert ranks_to_start(under, 2) == 2
    with pytest.raises(UserError, match="leave --ranks out"):
        ranks_to_start(under, 4)
