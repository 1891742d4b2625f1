"""A run in trouble: faults at random times for half an hour, and what was left of the time for training.

    python benchmarks/chaos.py --minutes 30 --seed 1 [--every 30] [--json FILE]

`bloomery train --ranks 2` trains a tiny model, each step of which takes a tenth of a second at least; whenever it ends
it is started again, as a batch script would. Every so many seconds (exponentially distributed, from the seed) something
happens: a rank or everything is killed, a rank is stopped for ever, a signal asks for a stop, the disk fills up, a rank
dies in the middle of a commit, the newest checkpoint is damaged. When the time is over the run is stopped, and as many
steps are trained undisturbed.

- effective training time: steps that stand in the end x seconds of an undisturbed step / seconds of the whole;
- steps lost: taken, and taken again because no checkpoint had them;
- back after: from the fault until the next start has taken a step;
- bit-identity: loss, gradient norm and samples of each step equal those of the undisturbed run.
"""

import argparse
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for the tests' tiny run, which is not installed

from launcher.lifetime import children, send
from launcher.run_directory import RunDirectory
from parallel.checkpoint.manifest import whole_steps
from parallel.common.files import write_json
from tests import conftest  # noqa: F401 - one thread, no network, before torch is imported
from tests.launcher.tiny import command, configuration, environment, make_store

RANKS, SAVE_EVERY_STEPS, STEP_SECONDS = 2, 50, 0.1
WAIT_SECONDS = 180
"""For a start to take its first step, or to end after a fault, on a machine with much else to do."""
DISK_MIB = 64
LAST_STEP = 10**7
EXACT = ("step", "loss", "grad_norm", "batch_hash")
Numbers = list[tuple[Any, ...]]


@dataclass(kw_only=True)
class Hit:
    """A fault that was done to the run."""

    what: str
    at: float
    back_after_seconds: float | None = None
    steps_lost: int = 0
    code: int | None = None


@dataclass(kw_only=True)
class Run:
    """The run, whichever attempt it is in."""

    config: Path
    process: subprocess.Popen[bytes] | None = None
    hits: list[Hit] = field(default_factory=list)

    @property
    def directory(self) -> RunDirectory:
        """Its records."""
        return RunDirectory(self.config.parent / "run")

    @property
    def step(self) -> int:
        """The last one written down."""
        return max((record["step"] for record in self.directory.metrics), default=0)

    @property
    def alive(self) -> bool:
        """Whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def ranks(self) -> list[int]:
        """Process ids, in the order of their start; children of torchrun, which is the command's child."""
        assert self.process is not None
        return sorted(rank for agent in children(self.process.pid) for rank in children(agent))

    def start(self, fault: str = "") -> None:
        """The same command again."""
        faults = f"train.step:sleep={STEP_SECONDS}" + (f",{fault}" if fault else "")
        with (self.config.parent / "output").open("ab") as output:
            self.process = subprocess.Popen(
                command("train", self.config, "--ranks", str(RANKS)),
                env={**environment(), "BLOOMERY_FAULT": faults},
                stdout=output,
                stderr=output,
            )


def kill_a_rank(run: Run, chance: random.Random) -> None:
    """SIGKILL, as the kernel does where memory is exhausted."""
    send(chance.choice(run.ranks()), signal.SIGKILL)


def kill_everything(run: Run, _chance: random.Random) -> None:
    """As a power cut does; the ranks die with the command."""
    assert run.process is not None
    run.process.kill()


def stop_a_rank_for_ever(run: Run, chance: random.Random) -> None:
    """It hangs, and the watchdog has to see it."""
    send(chance.choice(run.ranks()), signal.SIGSTOP)


def time_limit(run: Run, _chance: random.Random) -> None:
    """As Slurm announces it."""
    assert run.process is not None
    run.process.send_signal(signal.SIGUSR1)


def preemption(run: Run, _chance: random.Random) -> None:
    """As Slurm announces that."""
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)


def fill_the_disk(run: Run, chance: random.Random) -> None:
    """All but a few bytes, until the run has ended."""
    place = run.config.parent
    left = chance.choice((0, 100_000))
    (place / "filler").write_bytes(bytes(max(0, shutil.disk_usage(place).free - left)))


def damage_the_newest_checkpoint(run: Run, chance: random.Random) -> None:
    """And kill everything, so that it is wanted."""
    kill_everything(run, chance)
    steps = whole_steps(run.directory.checkpoints)
    if len(steps) > 1:
        shard = chance.choice(sorted((steps[max(steps)] / "tensors").glob("*.distcp")))
        content = bytearray(shard.read_bytes())
        content[chance.randrange(len(content))] ^= 1
        shard.write_bytes(content)


FAULTS: dict[str, Callable[[Run, random.Random], None]] = {
    "a rank is killed": kill_a_rank,
    "everything is killed": kill_everything,
    "a rank is stopped for ever": stop_a_rank_for_ever,
    "USR1": time_limit,
    "TERM": preemption,
    "the disk is full": fill_the_disk,
    "the newest checkpoint is damaged": damage_the_newest_checkpoint,
}
IN_A_SAVE = "a rank is killed in a save"
POINTS = ("before_manifest", "after_manifest", "before_rename", "after_rename", "retention")


def chaos(run: Run, *, minutes: float, every_seconds: float, chance: random.Random) -> float:
    """Trains and disturbs until the time is over; the seconds that it took."""
    began = time.monotonic()
    end = began + 60 * minutes
    ways = [*FAULTS, IN_A_SAVE]
    chance.shuffle(ways)
    for number in range(10**6):
        way = ways[number % len(ways)]
        armed = f"checkpoint.{chance.choice(POINTS)}:2" if way == IN_A_SAVE else ""
        first, before = run.step, len(list(run.directory.history))
        run.start(armed)
        _wait(lambda before=before: len(list(run.directory.history)) > before or not run.alive, "a start")
        history = list(run.directory.history)
        resumed = history[-1]["from_step"] if len(history) > before else 0
        _wait(lambda resumed=resumed: run.step > resumed or not run.alive, "a step")
        if run.hits:
            run.hits[-1].back_after_seconds = time.monotonic() - run.hits[-1].at
            run.hits[-1].steps_lost = max(0, first - resumed)
        if time.monotonic() > end:
            break
        if not armed:
            _sleep(min(chance.expovariate(1 / every_seconds), end - time.monotonic()), run)
        if time.monotonic() > end:
            break
        run.hits.append(Hit(what=way, at=time.monotonic()))
        if armed:
            _wait(lambda: not run.alive, "the end in a save", patience=WAIT_SECONDS)
            run.hits[-1].at = time.monotonic()
        else:
            FAULTS[way](run, chance)
            _wait(lambda: not run.alive, f"the end after: {way}")
        assert run.process is not None
        run.hits[-1].code = run.process.returncode
        (run.config.parent / "filler").unlink(missing_ok=True)
    assert run.process is not None
    run.process.terminate()
    code = run.process.wait(WAIT_SECONDS)
    if code != 75:
        raise SystemExit(
            f"the run ended with {code}, not with 75: {(run.config.parent / 'output').read_text()[-3000:]}"
        )
    return time.monotonic() - began


def _sleep(seconds: float, run: Run) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and run.alive:
        time.sleep(0.1)


def _wait(condition: Callable[[], bool], what: str, *, patience: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {patience} s: {what}")
        time.sleep(0.05)


def numbers(directory: RunDirectory) -> Numbers:
    """What must be the same, to the bit."""
    return [tuple(record[name] for name in EXACT) for record in directory.metrics]


def configured(directory: Path, store: Path, steps: int) -> Path:
    """The configuration of a run of so many steps, which have the same numbers in a longer run."""
    directory.mkdir(parents=True, exist_ok=True)
    return configuration(
        directory,
        store,
        train={"steps": steps},
        optimizer={"schedule": {"name": "constant", "warmup_steps": 0}},
        checkpoint={"every_steps": SAVE_EVERY_STEPS, "keep": 3, "asynchronous": True, "fallback": True},
        watchdog={"limit_seconds": 15.0, "long_limit_seconds": 120.0},
    )


def undisturbed(directory: Path, store: Path, steps: int) -> Numbers:
    """The same steps, with nothing happening."""
    config = configured(directory, store, steps)
    done = subprocess.run(
        command("train", config, "--ranks", str(RANKS)), env=environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the undisturbed run failed:\n{done.stdout}{done.stderr}")
    return numbers(RunDirectory(directory / "run"))


def table(hits: Sequence[Hit]) -> str:
    """A line for each kind of fault."""
    by_kind: dict[str, list[Hit]] = defaultdict(list)
    for hit in hits:
        by_kind[hit.what].append(hit)
    lines = ["| fault | times | exit codes | steps lost | back after, median |", "| --- | --- | --- | --- | --- |"]
    for what, of_kind in sorted(by_kind.items()):
        codes = ", ".join(map(str, sorted({hit.code for hit in of_kind if hit.code is not None})))
        back = [hit.back_after_seconds for hit in of_kind if hit.back_after_seconds is not None]
        median = f"{statistics.median(back):.1f} s" if back else ""
        lines.append(f"| {what} | {len(of_kind)} | {codes} | {sum(hit.steps_lost for hit in of_kind)} | {median} |")
    return "\n".join(lines)


def main() -> int:
    """Prints the figures; exit code 1 where some step has other bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of trouble; the undisturbed run comes on top")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=30.0, help="seconds of training between two faults, on average")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bloomery-chaos-") as name:
        place = Path(name) / "disturbed"
        place.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "chaos", place], capture_output=True, check=False
        )
        if mounted.returncode:
            print("not root: no small disk, so the disk does not fill up")
            FAULTS.pop("the disk is full")
        try:
            store = make_store(Path(name) / "store")
            run = Run(config=configured(place, store, LAST_STEP))
            chance = random.Random(options.seed)
            seconds = chaos(run, minutes=options.minutes, every_seconds=options.every, chance=chance)
            found = numbers(run.directory)
            attempts = list(run.directory.history)
        finally:
            if not mounted.returncode:
                subprocess.run(["umount", "--lazy", place], check=True)
        expected = undisturbed(Path(name) / "undisturbed", store, len(found))
    wrong = [mine for mine, theirs in zip(found, expected, strict=True) if mine != theirs]
    lost = sum(attempt["steps_lost"] for attempt in attempts)
    figures = {
        "minutes": seconds / 60,
        "seed": options.seed,
        "faults": len(run.hits),
        "restarts": len(attempts) - 1,
        "steps": len(found),
        "steps_lost": lost,
        "effective_training_time": len(found) * STEP_SECONDS / seconds,
        "bit_identical": not wrong,
    }
    same = f"{len(wrong)} steps DIFFER, first {wrong[0]}" if wrong else "every step has the bits of an undisturbed run"
    print(table(run.hits))
    print(
        f"\n{seconds / 60:.1f} minutes, {len(run.hits)} faults, {len(attempts) - 1} restarts, {len(found)} steps, "
        f"{lost} lost; effective training time {figures['effective_training_time']:.0%}; {same}"
    )
    if options.json is not None:
        write_json(options.json, figures)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
