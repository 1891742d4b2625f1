"""What slurm/train.sbatch asks Bloomery: may this job begin, and what now that its ranks have ended?

    python -P -m launcher.slurm.job begin WORDS          prints the run's directory; nothing where it is finished
    python -P -m launcher.slurm.job after ... -- WORDS   prints VERDICT CODE [NODES to leave out]

WORDS are those of `bloomery train`.

The verdicts: `stop` (with that exit code), `again` (on the same nodes, at once), `requeue` (Slurm starts the job anew,
on other nodes where some are to be left out). Imports without torch: the batch script runs it on the job's first node.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import config as configuration
from launcher.blame import Kind
from launcher.cli import guarded
from launcher.length import total_steps
from launcher.outcome import Outcome
from launcher.run_directory import RunDirectory
from launcher.slurm.lead import lead_time_too_short
from launcher.verbs.train import prepared, split
from parallel.checkpoint.manifest import whole_steps
from parallel.common.lines import JsonLines

_UNSAVED_TIMES = 3
BLAMED_TIMES = 2
"""A node that cost so many attempts is left out of the next one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """What is known after the ranks of an attempt ended otherwise than with their goal reached."""

    code: int
    """The exit code of srun."""
    outcome: Outcome | None
    """What the ranks said themselves, if they could."""
    asked: bool
    """The time limit is near: Slurm sent the signal that this job had asked for."""
    preempted: bool
    """Slurm wants the nodes for a job of a higher priority, and this one still runs, in its grace time."""
    hopeless: str | None
    """Why it would end so again, where the starts before this one say so."""
    hung: bool = False
    """The watchdog ended it: nothing was saved, and what hung may do so again."""
    killed: str | None = None
    """Which rank was killed or hung, where one was: the cause of what the others met with."""
    bad_nodes: tuple[str, ...] = ()
    """Nodes that cost attempts again and again, where enough others are to be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the batch script does."""

    word: str
    code: int
    because: str
    exclude: tuple[str, ...] = ()


def decide(ended: Ended) -> Verdict:
    """The rule. A job that was cancelled never comes here: the batch script sees that it does not run any more."""
    outcome = ended.outcome
    said = outcome.exit_code if outcome is not None else None
    cause = outcome.message if outcome is not None else f"the ranks ended without a word (code {ended.code})"
    if said in (0, 2, 130):
        return Verdict(word="stop", code=said, because=cause)
    if ended.asked or ended.preempted or (said == 75 and not ended.hung):
        why = "the time limit is near" if ended.asked else "preempted" if ended.preempted else "asked to stop"
        return Verdict(word="requeue", code=75, because=f"{why}: {cause}")
    cause = ended.killed or cause
    if ended.hopeless:
        return Verdict(word="stop", code=1, because=f"{cause}: {ended.hopeless}")
    if ended.bad_nodes:
        because = f"{cause}; {', '.join(ended.bad_nodes)} left out: bad, or the end of {BLAMED_TIMES} attempts"
        return Verdict(word="requeue", code=75, because=because, exclude=ended.bad_nodes)
    if ended.hung:
        return Verdict(word="requeue", code=75, because=cause)
    return Verdict(word="again", code=said or 1, because=cause)


def begin(words: Sequence[str]) -> int:
    """Checks all that `bloomery train` would check on every rank, and prints the directory of a run to be trained."""
    config = configuration.load(*split(words))
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    ranks = int(os.environ.get("BLOOMERY_RANKS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE") or 1)
    _, directory = prepared(config, ranks=nodes * ranks)
    if directory.finished(config):
        print(f"{directory.path} is finished: {total_steps(config)} steps.", file=sys.stderr)
        return 0
    directory.logs.mkdir(parents=True, exist_ok=True)
    short = lead_time_too_short(directory.events)
    if short is not None:
        print(short, file=sys.stderr)
    print(directory.path.resolve())
    return 0


def after(options: argparse.Namespace) -> int:
    """Reads what the attempt left and prints the verdict."""
    config = configuration.load(*split(options.words))
    directory = RunDirectory(configuration.run_directory(config))
    told = Outcome.read(Path(os.environ["BLOOMERY_OUTCOME"]))
    outcome = told if told is not None and told.attempt == options.attempt else None
    hung = any(event["event"] == "hung" and event["attempt"] == options.attempt for event in directory.events)
    failed = hung or outcome is None or outcome.exit_code not in (0, 2, 75, 130)
    excluded = _words(options.excluded.replace("(null)", ""))
    verdict = decide(
        Ended(
            code=options.code,
            outcome=outcome,
            asked=options.asked,
            preempted=options.preempted not in ("None", "Unknown", ""),
            hung=hung,
            hopeless=hopeless(directory, options.attempt, config.slurm.tries) if failed else None,
            killed=_cause(directory, options.attempt),
            bad_nodes=bad_nodes(directory, usable=_words(options.usable), needed=options.nodes, excluded=excluded),
        )
    )
    print(verdict.because, file=sys.stderr)
    print(verdict.word, verdict.code, ",".join(dict.fromkeys((*excluded, *verdict.exclude))) if verdict.exclude else "")
    return 0


def hopeless(directory: RunDirectory, attempt: str, tries: int) -> str | None:
    """Notes a failed start; why there is no use in another, where so many in a row, with it, came no further.

    Several times as many are borne that come a little further each time, but never to the next checkpoint.
    """
    failures = JsonLines(directory.logs / "failed-starts.jsonl")
    newest = max(whole_steps(directory.checkpoints), default=0)
    reached = max((record["step"] for record in directory.metrics), default=0)
    failures.append({"attempt": attempt, "newest_step": newest, "step": max(newest, reached)})
    in_a_row, furthest, unsaved = 0, -1, 0
    for failure in failures:
        in_a_row = in_a_row + 1 if failure["step"] <= furthest else 1
        furthest = max(furthest, failure["step"])
        unsaved += failure["newest_step"] == newest
    if in_a_row >= tries:
        return f"{in_a_row} starts in a row came no further than step {furthest} (slurm.tries)"
    if unsaved >= tries * _UNSAVED_TIMES:
        return f"{unsaved} starts in a row ended without a newer checkpoint than that of step {newest}"
    return None


def bad_nodes(
    directory: RunDirectory, *, usable: Sequence[str], needed: int, excluded: Sequence[str]
) -> tuple[str, ...]:
    """Nodes to stay away from from now on; none where too few others would be left."""
    attempts: dict[str, set[str]] = {}
    bad = set()
    for line in _blame(directory):
        attempts.setdefault(line["host"], set()).add(line["attempt"])
        if line.get("kind") == Kind.bad or len(attempts[line["host"]]) >= BLAMED_TIMES:
            bad.add(line["host"])
    bad -= set(excluded)
    left = set(usable) - bad - set(excluded)
    return tuple(sorted(bad)) if len(left) >= needed else ()


def _cause(directory: RunDirectory, attempt: str) -> str | None:
    """Whose fault the end of an attempt was; a slow node ends none."""
    mine = [line for line in _blame(directory) if line["attempt"] == attempt and line.get("kind") != Kind.slow]
    return mine[0]["cause"] if mine else None


def _blame(directory: RunDirectory) -> JsonLines:
    """Nodes that cost attempts (launcher/blame.py)."""
    return JsonLines(directory.logs / "blame.jsonl")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main(arguments: Sequence[str]) -> int:
    """Runs one word; the exit code is 2 where the user has to do something, whose sentence is on stderr."""
    parser = argparse.ArgumentParser(prog="launcher.slurm.job")
    parser.add_argument("word", choices=["begin", "after"])
    parser.add_argument("--attempt", default="")
    parser.add_argument("--code", type=int, default=1)
    parser.add_argument("--asked", action="store_true")
    parser.add_argument("--preempted", default="None")
    parser.add_argument("--usable", default="")
    parser.add_argument("--excluded", default="")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("words", nargs="+")
    options = parser.parse_intermixed_args(list(arguments))
    return guarded(lambda: begin(options.words) if options.word == "begin" else after(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
