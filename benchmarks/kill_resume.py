"""Runs that are killed again and again end with the same bits as one that is not.

    python benchmarks/kill_resume.py --rounds 200 [--seed 1] [--json FILE]

A round is one SIGKILL of a training run of two ranks that saves after every step: at a named point of a save, or at a
random moment of training or of starting, of one rank or of both. Where one rank is left over, it fails by itself or is
ended soon, as torchrun would end it. After each round everything under `checkpoints/` is compared with
an undisturbed run of the same configuration, file by file:

- each checkpoint that is listed has the very bytes of that step, so it is no mixture;
- no committed one is lost but to retention: the newest is never older than before, nor than what the run has told of;
- the next start goes on from the newest, and from scratch only where nothing was ever committed;

A run dies a few times and is then let through: its losses, gradient norms and batches must be those of the undisturbed
run to the bit, and so must its last checkpoint. Ranks are forked from this process, which has imported everything.
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # for the tests' tiny run, which is not installed

from launcher.run_directory import RunDirectory
from parallel.checkpoint.integrity import problems
from parallel.checkpoint.manifest import Manifest, step_directories, whole_manifests
from parallel.common.files import write_json
from tests import conftest  # noqa: F401 - one thread, no network, before torch is imported
from tests.launcher.tiny import Started, configuration, make_store, run, start

STEPS, RANKS = 10, 2
LIMIT_SECONDS = 120
"""For a start to end or to be killed, on a machine with much else to do."""
GRACE_SECONDS = 5.0
"""After a rank has died, until what is left of its run is killed, too."""
DEATHS = (2, 6)
"""At least and at most so many of each run."""
POINTS = ("shard_half_written", "before_manifest", "after_manifest", "before_rename", "after_rename", "retention")
WRITES_A_SAVE = 1_000
"""About how often a rank passes `shard_half_written` in one save of this model."""

CASES: dict[str, dict[str, Any]] = {
    "zero1": {},
    "zero2-asynchronous": {"parallel": {"zero_stage": 2}, "checkpoint": {"asynchronous": True}},
    "tp2": {"parallel": {"tensor": 2}, "model": {"dropout": 0.1}},
    "pp2-asynchronous": {"parallel": {"pipeline": 2}, "checkpoint": {"asynchronous": True}},
}
EXACT = ("step", "loss", "grad_norm", "learning_rate", "tokens", "samples", "batch_hash")
"""Of `metrics.jsonl`; JSON's floats are whole, so equal text is equal bits."""


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What must come out."""

    metrics: list[dict[str, Any]]
    checkpoints: dict[int, dict[str, Any]]
    """By step, what is the same for every attempt: files with their hashes, metrics, participants."""
    starting_seconds: float
    training_seconds: float


@dataclass(kw_only=True)
class Found:
    """Counts, and what went wrong, in words."""

    rounds: int = 0
    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    resumed_from: Counter[int] = field(default_factory=Counter)
    """By step, how many starts; 0 is a start where nothing had been committed yet."""
    wrong: list[str] = field(default_factory=list)


def content(manifest: Manifest) -> dict[str, Any]:
    """What a checkpoint holds, whoever wrote it."""
    return {
        "files": {name: asdict(record) for name, record in manifest.files.items()},
        "metrics": manifest.metrics,
        "participants": manifest.participants,
    }


def metrics(run_directory: RunDirectory) -> list[dict[str, Any]]:
    """The numbers of every step that must not depend on what happened to the run."""
    return [{key: record[key] for key in EXACT} for record in run_directory.metrics]


def configured(directory: Path, store: Path, case: str, keep: int) -> Path:
    """The configuration file of a run in `directory`."""
    sections = CASES[case]
    checkpoint = {"every_steps": 1, "keep": keep, **sections.get("checkpoint", {})}
    directory.mkdir(parents=True)
    return configuration(directory, store, **{**sections, "train": {"steps": STEPS}, "checkpoint": checkpoint})


def undisturbed(directory: Path, store: Path, case: str) -> Undisturbed:
    """One run to its end, keeping every checkpoint."""
    config = configured(directory, store, case, keep=STEPS)
    started = time.time()
    codes, said = run("train", config, ranks=RANKS)
    if codes != [0] * RANKS:
        raise SystemExit(f"the undisturbed run of {case} failed:\n{said}")
    found = RunDirectory(directory / "run")
    manifests = whole_manifests(found.checkpoints).values()
    first, *_, last = [event["time"] for event in found.events]
    return Undisturbed(
        metrics=metrics(found),
        checkpoints={manifest.step: content(manifest) for manifest in manifests},
        starting_seconds=first - started,
        training_seconds=last - first,
    )


@dataclass(frozen=True, kw_only=True)
class Kill:
    """How a start ends: at a point of a save, or at a random moment where there is none."""

    point: str | None = None
    ranks: tuple[int, ...]
    early: bool = False
    """At a random moment of starting, else of training."""

    @property
    def name(self) -> str:
        """For the table."""
        where = self.point or f"a random moment of {'starting' if self.early else 'training'}"
        return f"{where} on {'both ranks' if len(self.ranks) > 1 else f'rank {self.ranks[0]}'}"

    def armed(self, saves: int, chance: random.Random) -> dict[int, str]:
        """By rank, what makes it kill itself in one of the next so many saves."""
        passes = saves * WRITES_A_SAVE if self.point == "shard_half_written" else saves
        return {rank: f"checkpoint.{self.point}:{chance.randint(1, passes)}" for rank in self.ranks if self.point}


KILLS = (
    *(Kill(point=point, ranks=(0,)) for point in POINTS),
    Kill(point="shard_half_written", ranks=(1,)),
    *(Kill(ranks=ranks, early=early) for ranks in ((0, 1), (0,), (1,)) for early in (False, False, True)),
)


class Life:
    """One run, from its first start to its end."""

    def __init__(self, directory: Path, store: Path, case: str, wanted: Undisturbed, found: Found) -> None:
        self._config = configured(directory, store, case, keep=2)
        self._run = RunDirectory(directory / "run")
        self._name = f"{directory.name} ({case})"
        self._wanted = wanted
        self._found = found
        self._newest = 0
        self._starts: list[str] = []

    def _wrong(self, text: str) -> None:
        self._found.wrong.append(f"{self._name}, {', '.join(self._starts)}: {text}")

    def dies(self, kill: Kill, chance: random.Random) -> bool:
        """Starts the run and kills it; whether it did not end before."""
        self._starts.append(kill.name)
        saves = max(1, STEPS - self._newest)
        attempt = start("train", self._config, ranks=RANKS, faults=kill.armed(saves, chance))
        if kill.point is None:
            if not kill.early:
                self._wait_for_training(attempt)
            whole = self._wanted.starting_seconds if kill.early else self._wanted.training_seconds * saves / STEPS
            time.sleep(chance.uniform(0, whole))
            for rank in kill.ranks:
                os.kill(attempt.processes[rank], signal.SIGKILL)
        codes = self._codes(attempt)
        died = -signal.SIGKILL in codes
        self._look()
        if died and 0 in codes and self._newest < STEPS:
            self._wrong(f"a rank ended with success: {codes}\n{attempt.said()}")
        attempt.output.unlink()
        if died:
            self._found.rounds += 1
            self._found.kills[kill.name] += 1
        return died

    def _wait_for_training(self, attempt: Started) -> None:
        """Returns when this start has written down where it begins."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(list(self._run.history)) == self._begun and time.monotonic() < deadline:
            if os.waitid(os.P_PID, attempt.processes[0], os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.01)

    def _codes(self, attempt: Started) -> list[int]:
        """Exit codes of the ranks."""
        codes: dict[int, int] = {}
        deadline = time.monotonic() + LIMIT_SECONDS
        while len(codes) < RANKS:
            for process in set(attempt.processes) - set(codes):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    codes[process] = os.waitstatus_to_exitcode(status)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                elif time.monotonic() > deadline:
                    if not codes:
                        self._wrong(f"nothing happened for {LIMIT_SECONDS} s:\n{attempt.said()}")
                    os.kill(process, signal.SIGKILL)
                    codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            time.sleep(0.01)
        return [codes[process] for process in attempt.processes]

    def _look(self) -> None:
        """Compares what stands on the disk with the undisturbed run."""
        history = list(self._run.history)
        for entry in history[self._begun :]:
            self._found.resumed_from[entry["from_step"]] += 1
            if entry["from_step"] != self._newest:
                self._wrong(f"it went on from step {entry['from_step']}, and the newest whole one was {self._newest}")
        self._begun = len(history)
        directories = step_directories(self._run.checkpoints)
        whole = whole_manifests(self._run.checkpoints)
        for path in set(directories.values()) - set(whole):
            self._wrong(f"{path.name} is not whole")
        for path, manifest in whole.items():
            for problem in problems(path, manifest):
                self._wrong(problem)
            if content(manifest) != self._wanted.checkpoints[manifest.step]:
                self._wrong(f"{path.name} is not what an undisturbed run saves")
        told = [event["step"] for event in self._run.events if event["event"] == "saved"]
        newest = max((manifest.step for manifest in whole.values()), default=0)
        if newest < max([self._newest, *told]):
            self._wrong(f"the newest is step {newest}: {self._newest} was there before, and it told of {told}")
        self._newest = newest

    _begun = 0

    def ends(self) -> None:
        """Lets the run through and compares its numbers."""
        self._starts.append("let through")
        codes, said = run("train", self._config, ranks=RANKS)
        if codes != [0] * RANKS:
            self._wrong(f"it did not finish: {codes}\n{said}")
        self._look()
        if metrics(self._run) != self._wanted.metrics:
            self._wrong("its numbers are not those of an undisturbed run")
        if self._newest != STEPS:
            self._wrong(f"its last checkpoint is {self._newest}")
        self._found.runs += 1


def kill_runs(directory: Path, *, rounds: int, cases: Sequence[str], seed: int, kills: Sequence[Kill] = KILLS) -> Found:
    """Kills runs of the given cases in turn until so many have died; every way to die has its turn."""
    chance = random.Random(seed)
    store = make_store(directory / "store")
    wanted = {case: undisturbed(directory / "undisturbed" / case, store, case) for case in cases}
    ways = itertools.cycle(chance.sample(kills, len(kills)))
    found = Found()
    for number, case in enumerate(itertools.cycle(cases)):
        life = Life(directory / f"run-{number}", store, case, wanted[case], found)
        for _ in range(min(chance.randint(*DEATHS), rounds - found.rounds)):
            if not life.dies(next(ways), chance):
                break
        life.ends()
        if found.rounds >= rounds:
            return found
        shutil.rmtree(directory / f"run-{number}", ignore_errors=bool(found.wrong))
    raise AssertionError


def main() -> int:
    """Prints the counts; exit code 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="deaths")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the counts to this file")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bloomery-kill-") as name:
        found = kill_runs(Path(name), rounds=options.rounds, cases=tuple(CASES), seed=options.seed)
    for text, count in sorted(found.kills.items()):
        print(f"{count:6}  killed at {text}")
    scratch = found.resumed_from.pop(0, 0)
    print(f"{sum(found.resumed_from.values()):6}  starts went on from the newest whole checkpoint")
    print(f"{scratch:6}  starts at step 0, where none had been committed ({found.runs} of them the first of a run)")
    print(
        f"{found.rounds} kills of {found.runs} runs in {time.monotonic() - started:.0f} s, seed {options.seed}: "
        + (f"{len(found.wrong)} WRONG" if found.wrong else "every run ended with the bits of an undisturbed one")
    )
    for text in found.wrong:
        print(text, file=sys.stderr)
    if options.json:
        counts = {"kills": dict(found.kills), "resumed_from": {str(step): n for step, n in found.resumed_from.items()}}
        write_json(options.json, {"rounds": found.rounds, "runs": found.runs, "wrong": found.wrong, **counts})
    return int(bool(found.wrong))


if __name__ == "__main__":
    sys.exit(main())
