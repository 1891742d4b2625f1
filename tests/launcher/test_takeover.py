"""A frozen attempt that comes back after its run has gone over to another one."""

import signal
from pathlib import Path

import pytest

from launcher.outcome import Outcome
from launcher.run_directory import RunDirectory
from tests.launcher.test_train import wait_for_step
from tests.launcher.tiny import configuration, ran, start


@pytest.mark.distributed
@pytest.mark.fault(
    number=13,
    fault="a frozen attempt thaws after its run was finished by another",
    holds="it is told so and ends with 2; no file of the run changes",
    back_after="nothing stops: the other attempt has the run",
)
def test_a_thawed_attempt_commits_nothing(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 60}, checkpoint={"every_steps": 10})
    directory = RunDirectory(tmp_path / "run")
    frozen = start("train", config)
    wait_for_step(frozen, tmp_path, 3)
    frozen.send(signal.SIGSTOP)
    # On one machine the operating system holds the lock for the frozen process; a file server lets it expire.
    directory.lock.unlink()
    ran("train", config)
    outcome = Outcome.read(directory.outcome)
    before = {path: path.read_bytes() for path in directory.checkpoints.rglob("*") if path.is_file()}
    assert outcome is not None
    assert outcome.step == 60
    frozen.send(signal.SIGCONT)
    assert frozen.wait() == [2], frozen.said()
    assert f"belongs to the attempt {outcome.attempt} now" in frozen.said()
    assert {path: path.read_bytes() for path in directory.checkpoints.rglob("*") if path.is_file()} == before
    assert Outcome.read(directory.outcome) == outcome
    assert [line["step"] for line in directory.metrics] == list(range(1, 61)), "it writes no step down either"
