"""`--ranks N` as a user calls it: torchrun starts, signals and exit codes travel, nothing is left over."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.lifetime import children
from launcher.run_directory import RunDirectory
from tests.launcher.tiny import bloomery, command, configuration, environment, outcome_of, ran
from tests.launcher.tiny import run as forked

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Waits for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def begun(tmp_path: Path, store: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A long run on two ranks that has taken some steps, and the ids of all its processes below the first."""
    config = configuration(tmp_path, store, train={"steps": 100_000})
    process = subprocess.Popen(
        command("train", config, "--ranks", "2"),
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    until(lambda: process.poll() is not None or len(list(RunDirectory(tmp_path / "run").metrics)) > 3)
    assert process.poll() is None, process.communicate()
    (agent,) = children(process.pid)
    return process, [agent, *children(agent)]


def test_from_training_to_the_report_with_the_public_commands(tmp_path: Path, store: Path) -> None:
    """The first in processes of their own, as torchrun starts them; the others' own start is the same."""
    config = configuration(tmp_path, store, tracking={"wandb": {"mode": "offline"}})
    trained = bloomery("train", config, "--ranks", "2")
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    lines = trained.stdout.splitlines()
    assert lines[0].startswith("model: 40.1K parameters")
    assert all(line.startswith(("model:", "layout:", "step ", "finished:")) for line in lines), trained.stdout
    run = tmp_path / "run"
    assert "DEBUG" not in (run / "logs" / "rank-00000.log").read_text(), "torch tells of each tensor of each save"
    evaluated = ran("evaluate", run, "--json", tmp_path / "e.json", ranks=2)
    assert (tmp_path / "e.json").read_bytes() == (run / "evaluation.json").read_bytes()
    again = ran("evaluate", f"{run}@12")
    assert evaluated.startswith(again.splitlines()[0])
    generated = ran("generate", run, "--prompt", "iron", "--tokens", "4")
    assert generated.startswith("iron")
    assert forked("report", run) == ([0], f"written to {run}/report.html\n")


def test_a_signal_to_the_starter_saves_and_says_requeue(tmp_path: Path, store: Path) -> None:
    process, below = begun(tmp_path, store)
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert "stopped by SIGTERM after step" in output
    outcome = outcome_of(tmp_path)
    assert (RunDirectory(tmp_path / "run").checkpoints / f"step-{outcome.step:08d}" / "manifest.json").is_file()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in below)


@pytest.mark.long
def test_ranks_die_with_their_starter(tmp_path: Path, store: Path) -> None:
    process, below = begun(tmp_path, store)
    process.kill()
    process.communicate()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in below), seconds=60)


@pytest.mark.long
def test_a_rank_that_dies_ends_the_call_with_1(tmp_path: Path, store: Path) -> None:
    process, below = begun(tmp_path, store)
    os.kill(below[-1], signal.SIGKILL)
    _, error = process.communicate(timeout=180)
    assert process.returncode == 1
    assert error.strip()
    until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in below), seconds=60)


@pytest.mark.long
def test_a_mistake_that_only_the_ranks_see_is_one_sentence(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store)
    ran("train", config, "train.steps=3")
    (tmp_path / "run" / "outcome.json").unlink()
    state = tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json"
    state.write_bytes(state.read_bytes().replace(b"1", b"2", 1))
    done = bloomery("train", config, "train.steps=3", "--ranks", "2")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is damaged" in done.stderr
