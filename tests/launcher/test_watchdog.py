"""A rank that hangs is named, whatever it hangs in, and the job ends to be requeued."""

import itertools
import json
import os
import random
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import launcher.batches
from launcher.run_directory import RunDirectory
from launcher.watchdog.beats import Beats
from launcher.watchdog.collectives import waited_for
from launcher.watchdog.config import WatchdogConfig
from launcher.watchdog.stragglers import Suspicion
from launcher.watchdog.verdict import Report, judge
from tests.launcher.test_train import records, wait_for_step
from tests.launcher.tiny import configuration, outcome_of, ran, run, start

HOST = socket.gethostname()
LIMITS = {"limit_seconds": 2.0, "long_limit_seconds": 60.0}


def test_a_beat_that_is_half_written_is_not_read() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(Beats.size_bytes())
        beats = Beats(file.fileno())

        def beat(number: int) -> None:
            beats.write(number=number, step=number, phase=f"p{number}", limit_seconds=number, attempt=f"a{number}")

        beat(1)
        writer = os.fork()
        if writer == 0:
            for number in itertools.count(2):
                beat(number)
        try:
            found = [beats.read() for _ in range(20_000)]
        finally:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
    assert found[-1].number > found[0].number
    for each in found:
        n = each.number
        assert (each.step, each.phase, each.limit_seconds, each.attempt) == (n, f"p{n}", n, f"a{n}")
        assert each.since > 0


def sleep_for_ever() -> None:
    """Releases the interpreter."""
    time.sleep(1000)


def hold_the_interpreter() -> None:
    """A C call that never gives the interpreter back: no thread of Python runs in this process any more."""
    re.match("(a+)+$", "a" * 60 + "b")


def stop_itself() -> None:
    """As a debugger or a scheduler would."""
    os.kill(os.getpid(), signal.SIGSTOP)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, rank: int, what: Callable[[], None]) -> None:
    """Makes one rank do something when it asks for the batch of a step."""
    original = launcher.batches.Batches.next

    def patched(self: launcher.batches.Batches) -> object:
        taken = self.__dict__["taken"] = self.__dict__.get("taken", 0) + 1
        if taken == step and int(os.environ.get("RANK", "0")) == rank:
            what()
        return original(self)

    monkeypatch.setattr(launcher.batches.Batches, "next", patched)


@pytest.mark.fault(
    number=11,
    fault="one of two ranks sleeps, holds the interpreter in a C call, or is stopped by a signal",
    holds="named by rank, host, step and place; the stacks of all ranks are there; the outcome is 75; the run goes on",
    back_after=6.7,
)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("hang", "told"),
    [
        (sleep_for_ever, "hangs: step 6, data for "),
        (hold_the_interpreter, "hangs: step 6, data for "),
        (stop_itself, "is stopped (by a signal or a debugger): step 6, data for "),
    ],
    ids=["sleeps", "holds the interpreter", "stopped"],
)
def test_a_hung_rank_is_named(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, hang: Callable[[], None], told: str
) -> None:
    config = configuration(tmp_path, store, watchdog=LIMITS)
    with monkeypatch.context() as patched:
        at_step(patched, 6, 1, hang)
        began = time.monotonic()
        codes, said = run("train", config, ranks=2)
        assert time.monotonic() - began < LIMITS["long_limit_seconds"]
    assert codes == [-signal.SIGKILL] * 2, said
    directory = RunDirectory(tmp_path / "run")
    outcome = outcome_of(tmp_path)
    assert outcome.exit_code == 75
    assert outcome.step == 5
    assert f"rank 1 on {HOST} {told}" in outcome.message
    assert "1 other rank waits" in outcome.message
    assert outcome.message in said
    (hang_directory,) = directory.logs.glob("hang-*")
    stacks = [(hang_directory / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "torch/distributed" in stacks[0]
    assert hang is not sleep_for_ever or "in sleep_for_ever, called at launcher/meter.py" in outcome.message
    assert json.loads((hang_directory / "operations-00000.json").read_text())["newest"]
    assert hang is stop_itself or hang.__name__ in stacks[1]
    assert [event["event"] for event in directory.events][-1] == "hung"
    said = ran("train", config, ranks=2)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))


def test_a_rank_alone_is_watched_too(tmp_path: Path, store: Path) -> None:
    seldom = {"every_steps": 100_000}
    config = configuration(tmp_path, store, train={"steps": 100_000}, checkpoint=seldom, watchdog=LIMITS)
    started = start("train", config)
    wait_for_step(started, tmp_path, 30)  # behind the look at the speed, which has the longer limit, as saves
    started.send(signal.SIGSTOP)
    assert started.wait() == [-signal.SIGKILL]
    assert f"rank 0 on {HOST} is stopped" in started.said()


def test_nothing_is_watched_where_the_limit_is_null(tmp_path: Path, store: Path) -> None:
    config = configuration(tmp_path, store, train={"steps": 100_000}, watchdog={"limit_seconds": None})
    started = start("train", config)
    wait_for_step(started, tmp_path, 1)
    assert not Path(f"/proc/{started.processes[0]}/task/{started.processes[0]}/children").read_text().strip()
    started.send(signal.SIGKILL)
    started.wait()


def _report(
    rank: int, *, step: int = 7, waiting: bool = True, state: str = "S", phase: str = "collective", entered: int = 9
) -> Report:
    return Report(
        rank=rank, host=f"node{rank // 2}", process=1, step=step, phase=phase, seconds=20.0, state=state,
        where="parallel/engine.py:160 in accumulate", waiting=waiting,
        entered={"0": 40, "3": entered},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reports", "told"),
    [
        ([_report(0), _report(1), _report(2, waiting=False)], "rank 2 on node1 hangs: step 7"),
        ([_report(0), _report(1), _report(2)], "no word comes from rank 3 on node1: a dead or frozen node; 3 other"),
        ([_report(0), _report(1), _report(2), _report(3, step=6)], "rank 3 on node1 hangs: step 6"),
        ([_report(0), _report(1), _report(2, state="T"), _report(3, waiting=False)], "rank 2 on node1 is stopped"),
        ([*(_report(rank) for rank in range(3)), _report(3, entered=8)], "rank 3 on node1 hangs"),
        ([_report(rank) for rank in range(4)], "all 4 ranks stand still and cannot be told apart"),
        (
            [_report(0), *(_report(rank, waiting=False) for rank in (1, 2)), _report(3)],
            "rank 1 on node0 hangs: step 7, collective for 20 s, at parallel/engine.py:160 in accumulate; so do rank 2",
        ),
        ([_report(1, phase="rendezvous")], "the 4 ranks do not meet at"),
    ],
)
def test_the_culprit_is_told_from_those_that_wait(reports: list[Report], told: str) -> None:
    found = judge(reports, world_size=4, hosts={3: "node1"})
    assert found.sentence.startswith(told)
    assert found.sentence.count("\n") == 0
    assert (found.host == "node1") == told.startswith(
        ("rank 2 on node1 hangs", "rank 3", "rank 2 on node1 is", "no word")
    )


@pytest.mark.fault(
    number=12,
    fault="one of two ranks is stopped half of the time",
    holds="it is named by rank and host while the run goes on, from the time that the other waits for it",
    back_after="nothing stops",
)
@pytest.mark.distributed
def test_a_slow_rank_is_named_while_the_run_goes_on(tmp_path: Path, store: Path) -> None:
    config = configuration(
        tmp_path,
        store,
        train={"steps": 100_000},
        checkpoint={"every_steps": 100_000},
        watchdog={"straggler_steps": 10, "straggler_share": 0.25, "straggler_seconds": 0.5, "straggler_looks": 2},
    )
    started = start("train", config, ranks=2)
    events = RunDirectory(tmp_path / "run").events
    try:
        wait_for_step(started, tmp_path, 25)
        deadline = time.monotonic() + 60
        while not (found := [event for event in events if event.get("rank") == 1]) and time.monotonic() < deadline:
            for number in (signal.SIGSTOP, signal.SIGCONT):
                os.kill(started.processes[1], number)
                time.sleep(0.1)
    finally:
        started.send(signal.SIGKILL)
        started.wait()
    assert found, started.said()
    assert found[0]["event"] == "straggler"
    assert found[0]["host"] == HOST
    assert found[0]["share"] > 0.25
    assert started.said().count(f"rank 1 on {HOST} is slow: the others waited for it") == 1, "once, not at each look"


def test_only_who_stays_behind_is_named_and_once() -> None:
    """Looks of 20 s: noise of a shared machine, a rank that hangs back for a while, one that gets much slower."""
    chance = random.Random(1)
    suspicion = Suspicion(WatchdogConfig())
    told = []
    for look in range(300):
        shares = [max(0.0, chance.gauss(0.15, 0.05)) for _ in range(8)]  # all are late now and then, nobody always
        if 100 <= look < 200:
            shares[5] += 0.4
        if 150 <= look < 200:
            shares[5] += 0.5
        if 250 <= look < 254:
            shares[2] += 0.4  # too short to be told
        told += [(look, rank) for rank in suspicion.named(shares, 20.0 * look)]
    assert told == [(104, 5), (150, 5)]


def test_of_two_ranks_the_one_is_measured_by_the_other() -> None:
    suspicion = Suspicion(WatchdogConfig(straggler_looks=3, straggler_quiet_seconds=100.0))
    assert [suspicion.named([0.3, 0.28], 20.0 * look) for look in range(9)] == [[]] * 9, "both wait as much"
    found = [suspicion.named([0.05, 0.3 if look % 6 < 3 else 0.0], 20.0 * look) for look in range(18)]
    assert [look for look, ranks in enumerate(found) if ranks] == [2, 8, 14], "again where it had caught up"


def test_clocks_that_differ_make_nobody_late() -> None:
    """Three ranks, ten operations a second apart, each followed at once by another; rank 2's clock is an hour ahead."""
    second, hour = 10**9, 3600 * 10**9
    entered: list[dict[tuple[str, int], int]] = [{}, {}, {}]
    for number in range(10):
        for rank, clock in enumerate((0, 0, hour)):
            late = second // 4 if rank == 1 else 0
            entered[rank]["0", 2 * number] = clock + number * second + late
            entered[rank]["0", 2 * number + 1] = clock + number * second + second // 4
    assert waited_for(entered) == pytest.approx([0, 10 / 4, 0])
