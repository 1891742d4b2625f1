"""Faults that need no cluster: signals at bad times, disks, memory, ranks that do not meet.

The oracle is a run to which nothing happened: after the fault, the same command ends with the same bits.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.batches import Batches
from launcher.progress import Progress
from launcher.run_directory import RunDirectory
from launcher.verbs.status import status
from parallel.checkpoint.manifest import whole_steps
from tests.launcher.test_train import records, wait_for_step
from tests.launcher.tiny import Started, configuration, outcome_of, ran, run, start

pytestmark = pytest.mark.distributed
HOST = socket.gethostname()
LIMITS = {"limit_seconds": 2.0, "long_limit_seconds": 3.0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path) -> list[dict[str, Any]]:
    """What the twelve steps of the tiny configuration write down on two ranks."""
    directory = tmp_path_factory.mktemp("undisturbed")
    ran("train", configuration(directory, store), ranks=2)
    return records(directory)


def goes_on(directory: Path, config: Path, undisturbed: list[dict[str, Any]], *, after: int) -> None:
    """The same command goes on after a step, to the same bits, and nothing half-written is left."""
    began = time.time()
    said = ran("train", config, ranks=2)
    resumed = [event["time"] for event in RunDirectory(directory / "run").events if event["event"] == "resumed"]
    print(f"trained again {resumed[-1] - began:.1f} s after the call")
    assert f"going on after step {after} " in said
    assert records(directory) == undisturbed
    found = RunDirectory(directory / "run")
    assert list(found.checkpoints.glob(".attempt-*")) == []
    assert list(whole_steps(found.checkpoints))[-1] == 12


def wait_for(condition: Callable[[], object], started: Started) -> None:
    """Returns once something holds."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            started.send(signal.SIGKILL)
            started.wait()
            pytest.fail(started.said())
        time.sleep(0.01)


@pytest.mark.fault(
    number=9,
    fault="SIGTERM during a save, and once more",
    holds="that checkpoint is whole, the step after it is saved too, both ranks end with 75, the same bits",
    back_after=3.8,
)
def test_signals_during_a_save(tmp_path: Path, store: Path, undisturbed: list[dict[str, Any]]) -> None:
    config = configuration(tmp_path, store)
    started = start("train", config, ranks=2, faults={0: "checkpoint.before_rename:sleep=1.5"})
    checkpoints = RunDirectory(tmp_path / "run").checkpoints
    wait_for(lambda: list(checkpoints.glob(".attempt-*/manifest.json")), started)
    for _ in range(2):
        started.send(signal.SIGTERM)
        time.sleep(0.1)
    assert started.wait() == [75, 75], started.said()
    assert list(whole_steps(checkpoints)) == [4, 5]
    goes_on(tmp_path, config, undisturbed, after=5)


@pytest.mark.fault(
    number=9,
    fault="SIGUSR1 before the first step, again and again",
    holds="the first step is saved, both ranks end with 75, the same bits",
    back_after=3.4,
)
def test_a_signal_before_the_first_step(tmp_path: Path, store: Path, undisturbed: list[dict[str, Any]]) -> None:
    config = configuration(tmp_path, store)
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as the task of a Slurm job does, for torchrun's sake
    try:
        started = start("train", config, ranks=2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    alive = set(started.processes)
    while alive:
        for process in sorted(alive):
            os.kill(process, signal.SIGUSR1)
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                alive.remove(process)
        time.sleep(0.02)
    assert started.wait() == [75, 75], started.said()
    assert list(whole_steps(RunDirectory(tmp_path / "run").checkpoints)) == [1]
    goes_on(tmp_path, config, undisturbed, after=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "bloomery", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a small disk needs root: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def filled(disk: Path, *, left_bytes: int) -> Path:
    """A file that takes all room but so much."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - left_bytes))
    return filler


@pytest.mark.fault(
    number=16,
    fault="the disk is full: not a byte is left; or too few for a checkpoint",
    holds="the run ends with 2 and says where room is missing; the checkpoint before stands; with room, the same bits",
    back_after=4.3,
)
@pytest.mark.parametrize("left_bytes", [0, 256 << 10], ids=["none", "some"])
def test_a_full_disk(small_disk: Path, store: Path, undisturbed: list[dict[str, Any]], left_bytes: int) -> None:
    config = configuration(small_disk, store)
    started = start("train", config, ranks=2, faults={0: "train.step:sleep=0.1"})
    wait_for_step(started, small_disk, 5)
    filler = filled(small_disk, left_bytes=left_bytes)
    codes = started.wait()
    said = started.said()
    assert codes[0] == 2, said
    assert 0 not in codes
    assert "No space left on device" in said
    assert ("cannot save the checkpoint" in said) == bool(left_bytes)
    assert list(whole_steps(RunDirectory(small_disk / "run").checkpoints)) == [4]
    filler.unlink()
    goes_on(small_disk, config, undisturbed, after=4)


@pytest.mark.fault(
    number=16,
    fault="the disk is full for a while, and `checkpoint.failures` lets saves fail meanwhile",
    holds="training goes on without those checkpoints and says so; the later ones stand, the same bits",
    back_after="nothing stops",
)
def test_a_disk_that_is_full_for_a_while(small_disk: Path, store: Path, undisturbed: list[dict[str, Any]]) -> None:
    config = configuration(small_disk, store, checkpoint={"every_steps": 4, "keep": 8, "failures": 2})
    started = start("train", config, ranks=2, faults={0: "train.step:sleep=0.3"})
    wait_for_step(started, small_disk, 5)
    filler = filled(small_disk, left_bytes=256 << 10)
    directory = RunDirectory(small_disk / "run")
    until = time.monotonic() + 120
    while not (missed := [event for event in directory.events if event["event"] == "not_saved"]):
        assert time.monotonic() < until, started.said()
        time.sleep(0.05)
    assert "No space left on device" in (status(directory).last_error or "")
    filler.unlink()
    assert started.wait() == [0, 0], started.said()
    assert status(directory).last_error is None
    assert [event["step"] for event in missed] == [8]
    assert "No space left on device" in missed[0]["why"]
    assert "training goes on and the next save tries again (1 of checkpoint.failures=2)" in started.said()
    assert list(whole_steps(directory.checkpoints)) == [4, 12]
    assert records(small_disk) == undisturbed


@pytest.mark.fault(
    number=17,
    fault="writing fails (EIO, no space, no permission, a stale handle) in a shard or around the manifest, at once or "
    "in the background",
    holds="all ranks end with 2 and the cause, by the next step; the checkpoint before stands; the same bits",
    back_after=3.4,
)
@pytest.mark.parametrize(
    ("rank", "fault", "asynchronous", "told"),
    [
        (1, "checkpoint.shard_half_written:1500:error=EIO", False, "Input/output error"),
        (1, "checkpoint.shard_half_written:1500:error=ESTALE", True, "Stale file handle"),
        (0, "checkpoint.before_manifest:2:error=ENOSPC", True, "No space left on device"),
        (0, "checkpoint.before_rename:2:error=EACCES", False, "Permission denied"),
    ],
)
def test_writes_that_fail(
    tmp_path: Path, store: Path, undisturbed: list[dict[str, Any]], rank: int, fault: str, asynchronous: bool, told: str
) -> None:
    config = configuration(tmp_path, store, checkpoint={"every_steps": 4, "keep": 8, "asynchronous": asynchronous})
    slow = "train.step:sleep=0.3"  # no disk is that slow: the write has failed two steps later
    faults = {rank: f"{fault},{slow}", 1 - rank: slow} if asynchronous else {rank: fault}
    ran("train", config, ranks=2, faults=faults, code=2)
    assert f"step-00000008: {told}" in outcome_of(tmp_path).message or (
        f"step-00000008 on rank 1: {told}" in outcome_of(tmp_path).message
    )
    assert records(tmp_path)[-1]["step"] in ((8, 9, 10) if asynchronous else (8,))
    assert list(whole_steps(RunDirectory(tmp_path / "run").checkpoints)) == [4]
    goes_on(tmp_path, config, undisturbed, after=4)


@pytest.mark.fault(
    number=17,
    fault="the disk is slow: each commit takes half a second, in the background",
    holds="training goes on meanwhile, the same bits",
    back_after="nothing stops",
)
def test_writes_that_are_slow(tmp_path: Path, store: Path, undisturbed: list[dict[str, Any]]) -> None:
    config = configuration(tmp_path, store, checkpoint={"every_steps": 6, "keep": 8, "asynchronous": True})
    ran("train", config, ranks=2, faults={0: "checkpoint.before_rename:sleep=0.5"})
    assert records(tmp_path) == undisturbed
    times = {
        event["step"]: event["time"] for event in RunDirectory(tmp_path / "run").events if event["event"] == "saved"
    }
    assert list(times) == [6, 12]


@pytest.mark.fault(
    number=27,
    fault="one rank is three seconds late to where the ranks meet",
    holds="the others wait for it, the same bits",
    back_after="nothing stops: the others wait",
)
def test_a_rank_that_is_late(tmp_path: Path, store: Path, undisturbed: list[dict[str, Any]]) -> None:
    config = configuration(tmp_path, store)
    ran("train", config, ranks=2, faults={1: "rendezvous:sleep=3"})
    assert records(tmp_path) == undisturbed


@pytest.mark.fault(
    number=27,
    fault="a rank never comes to where the ranks meet; or the host to meet at does not exist",
    holds="within watchdog.long_limit_seconds the others end, and say where they waited for whom",
    back_after="ended at the limit; a job starts again",
)
@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_ranks_that_do_not_meet(tmp_path: Path, store: Path, host: str) -> None:
    config = configuration(tmp_path, store, watchdog=LIMITS)
    began = time.monotonic()
    missing = {1: "rendezvous:sleep=1000"} if host == "127.0.0.1" else {}
    started = start("train", config, ranks=2, faults=missing, meeting={"MASTER_ADDR": host})
    codes = started.wait()
    seconds = time.monotonic() - began
    print(f"ended after {seconds:.1f} s")
    assert seconds < 60
    assert 0 not in codes
    said = started.said()
    assert f"do not meet at {host}:" in said or f"cannot meet at {host}:" in said


@pytest.mark.fault(
    number=27,
    fault="the port to meet at is taken by somebody else",
    holds="the first rank ends with 2 at once and says so",
    back_after="ended at once; a job takes another port each time",
)
def test_a_port_that_is_taken(tmp_path: Path, store: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        started = start(
            "train", configuration(tmp_path, store, watchdog=LIMITS), ranks=2, meeting={"MASTER_PORT": port}
        )
        codes = started.wait()
    assert codes[0] == 2, started.said()
    assert f"the 2 ranks cannot meet at 127.0.0.1:{port}" in started.said()


@pytest.mark.fault(
    number=28,
    fault="a rank's host memory is exhausted, while it loads data; or in a save",
    holds="the rank, its host and the place are named, all ranks end; the checkpoint before stands, the same bits",
    back_after=4.0,
)
@pytest.mark.parametrize("where", ["loading", "saving"])
def test_memory_that_is_exhausted(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[dict[str, Any]], where: str
) -> None:
    owner, name = {"loading": (Batches, "next"), "saving": (Progress, "state_dict")}[where]
    original = getattr(owner, name)

    def hungry(self: object) -> object:
        bytearray(100 << 20)
        return original(self)

    config = configuration(tmp_path, store)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, hungry)
        codes, said = run("train", config, ranks=2, faults={1: "train.step:6:memory=64"})
    assert 0 not in codes, said
    assert outcome_of(tmp_path).message.startswith(f"rank 1 on {HOST}: the host's memory is exhausted at tests/"), said
    assert records(tmp_path)[-1]["step"] == (6 if where == "loading" else 8)
    goes_on(tmp_path, config, undisturbed, after=4)
