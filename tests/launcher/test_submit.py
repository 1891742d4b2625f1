"""`bloomery submit` up to the sbatch line, the batch script's decisions, and what a job leaves for the next one."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import cli
from launcher.config import RunConfig, load
from launcher.outcome import Outcome
from launcher.run_directory import Lock, RunDirectory
from launcher.slurm.config import TEXTS, SlurmConfig, minutes, slurm_problems
from launcher.slurm.job import Ended, Verdict, bad_nodes, decide, hopeless
from launcher.slurm.job import main as job_main
from launcher.slurm.lead import lead_time_too_short
from launcher.slurm.shrink import in_fewer_ranks
from launcher.slurm.submission import SCRIPTS, inherited
from parallel.common.errors import UserError
from parallel.common.lines import JsonLines
from tests.launcher.tiny import configuration, ran

HOSTILE = ("a\nb", "$(touch pwned)", "`id`", "../evil", "a;b", "a b", "--wrap=id", "a'b", 'a"b', "a\\b", "a\x00b", "%x")


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, the line and the complaint of `bloomery submit ... --dry-run`."""
    code = cli.main(["submit", *map(str, arguments), "--dry-run"])
    said = capsys.readouterr()
    return code, said.out.strip(), said.err


def test_the_line_is_sbatch_with_flags_on_the_script(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, store)
    flags = ["--partition", "gpu", "--time", "12h", "--gpus-per-node", "h100:2", "--account", "lab", "--chain", "2"]
    code, line, _ = dry_run(capsys, config, "--nodes", "2", *flags, "parallel.tensor=2", "slurm.exclude=[n1,n2]")
    assert code == 0
    words = shlex.split(line)
    assert words[0] == "sbatch"
    script = words.index(str(SCRIPTS / "train.sbatch"))
    assert words[script + 1 :] == [str(config), "parallel.tensor=2", "slurm.exclude=[n1,n2]"]
    assert {
        "--nodes=2", "--partition=gpu", "--time=720", "--gpus-per-node=h100:2", "--account=lab",
        "--exclude=n1,n2", "--signal=B:USR1@300", "--open-mode=append", "--dependency=singleton", "--requeue",
        "--job-name=tiny",
    } <= set(words[:script])  # fmt: skip
    assert not (tmp_path / "run").exists(), "a dry run leaves nothing"


@pytest.mark.fault(
    number=29,
    fault="a line break, `$(...)`, backticks, `../`, quotes or an option in each field that sbatch gets",
    holds="refused by the field's name, nothing submitted",
    back_after="refused",
)
@pytest.mark.parametrize("field", sorted(TEXTS))
def test_hostile_values_are_refused_by_the_field_s_name(field: str) -> None:
    for value in HOSTILE:
        problems = list(slurm_problems(filled(field, value)))
        assert f"slurm.{field}" in [problem.key for problem in problems], value


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TEXTS)), st.text(min_size=1, max_size=12))
def test_what_passes_is_inert_in_a_shell_and_in_a_script(field: str, value: str) -> None:
    if not list(slurm_problems(filled(field, value))):
        assert not set(value) & set(" \t\r\n\0$`'\"\\;<>{}!?%=")
        assert not value.startswith("-")
        assert "../" not in value


def filled(field: str, value: str) -> SlurmConfig:
    """The section with one field filled."""
    section, _, name = field.rpartition(".")
    base = SlurmConfig()
    holder = base.container if section else base
    changed = {name: [value] if isinstance(getattr(holder, name), list) else value}
    return (
        dataclasses.replace(base, container=dataclasses.replace(base.container, **changed))
        if section
        else (dataclasses.replace(base, **changed))
    )


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("run.name=../evil", "run.name"),
        ("run.name=$(touch pwned)", "run.name"),
        ("run.name=a\nb", "run.name"),
        ("run.dir=a/../b", "run.dir"),
        ("run.dir=runs/%x", "run.dir"),
        ("slurm.partition=$(touch pwned)", "slurm.partition"),
        ("data.store=a\nb", "data.store"),
    ],
)
def test_hostile_words_are_refused_by_their_key(
    word: str, key: str, tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line, told = dry_run(capsys, configuration(tmp_path, store), word)
    assert code == 2
    assert line == ""
    assert f"  {key} is " in told


def test_what_cannot_be_trained_is_not_submitted(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, store)
    code, _, told = dry_run(capsys, config, "--nodes", "3", "parallel.tensor=2", "--time", "12")
    assert code == 2
    assert "parallel.tensor is 2" in told
    assert "slurm.time is '12'" in told


@pytest.mark.fault(
    number=30,
    fault="secrets in the environment of the call",
    holds="the job inherits them by name; no line, configuration or script shows them",
    back_after="nothing stops",
)
def test_secrets_travel_by_name(
    tmp_path: Path, store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_LAB_TOKEN", "UNRELATED_SECRET"):
        monkeypatch.setenv(name, "canary-4711")
    code, line, told = dry_run(capsys, configuration(tmp_path, store), "slurm.environment=[MY_LAB_TOKEN]")
    assert code == 0
    assert "canary-4711" not in line + told
    export = next(word for word in shlex.split(line) if word.startswith("--export="))
    names = export.removeprefix("--export=").split(",")
    assert {"WANDB_API_KEY", "HF_TOKEN", "MY_LAB_TOKEN", "PATH"} <= set(names)
    assert "UNRELATED_SECRET" not in names
    assert inherited({"LD_PRELOAD": "", "BASH_ENV": "", "NCCL_DEBUG": ""}, []) == ["NCCL_DEBUG"]


@pytest.mark.parametrize(
    ("given", "expected"), [("90m", "90"), ("12h", "720"), ("2d", "2880"), ("1-02:03:04", "1-02:03:04")]
)
def test_time_limits(given: str, expected: str) -> None:
    assert minutes(given) == expected


def ended(code: int | None = None, **facts: object) -> Ended:
    """An attempt that ended with this exit code, as its ranks said; None where they could say nothing."""
    outcome = None if code is None else Outcome(attempt="a", exit_code=code, message="said")
    known: dict[str, object] = {"code": 1, "asked": False, "preempted": False, "hopeless": None}
    return Ended(outcome=outcome, **{**known, **facts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "word", "code"),
    [
        (ended(75, asked=True), "requeue", 75),
        (ended(75), "requeue", 75),
        (ended(75, preempted=True), "requeue", 75),
        (ended(None, preempted=True), "requeue", 75),
        (ended(None, asked=True), "requeue", 75),
        (ended(1, asked=True), "requeue", 75),
        (ended(0), "stop", 0),
        (ended(2), "stop", 2),
        (ended(2, asked=True), "stop", 2),
        (ended(130), "stop", 130),
        (ended(1), "again", 1),
        (ended(None), "again", 1),
        (ended(1, hopeless="3 starts"), "stop", 1),
        (ended(1, bad_nodes=("n1",)), "requeue", 75),
        (ended(75, hung=True), "requeue", 75),
        (ended(75, hung=True, hopeless="3 starts"), "stop", 1),
        (ended(75, hopeless="3 starts"), "requeue", 75),
        (ended(1, bad_nodes=("n1",), hopeless="3 starts"), "stop", 1),
    ],
)
def test_what_follows_an_attempt(facts: Ended, word: str, code: int) -> None:
    verdict = decide(facts)
    assert (verdict.word, verdict.code) == (word, code)


def test_the_rank_that_was_killed_is_the_cause_and_not_what_the_others_met_with() -> None:
    assert decide(ended(1, killed="rank 3 on n1 was killed by SIGKILL")) == Verdict(
        word="again", code=1, because="rank 3 on n1 was killed by SIGKILL"
    )


def test_a_crash_that_repeats_at_the_same_step_is_hopeless(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.logs.mkdir()

    def failed(at: int) -> str | None:
        directory.metrics.keep(lambda _: False)
        directory.metrics.append({"step": at})
        return hopeless(directory, "a", 3)

    assert [failed(at) for at in (7, 9, 8)] == [None] * 3, "it came further in between"
    assert failed(9) == "3 starts in a row came no further than step 9 (slurm.tries)"
    assert [failed(at) for at in range(10, 14)] == [None] * 4
    assert failed(14) == "9 starts in a row ended without a newer checkpoint than that of step 0"


def test_a_node_that_loses_ranks_twice_is_left_out_where_enough_others_are(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.logs.mkdir()
    blame = JsonLines(directory.logs / "blame.jsonl")
    for attempt, host in (("a", "n1"), ("b", "n2"), ("b", "n1"), ("b", "n1")):
        blame.append({"attempt": attempt, "host": host, "cause": "", "kind": "killed"})
    nodes = ["n0", "n1", "n2"]
    assert bad_nodes(directory, usable=nodes, needed=2, excluded=[]) == ("n1",)
    assert bad_nodes(directory, usable=nodes, needed=3, excluded=[]) == ()
    assert bad_nodes(directory, usable=nodes, needed=2, excluded=["n1"]) == ()
    blame.append({"attempt": "c", "host": "n0", "cause": "", "kind": "bad"})
    assert bad_nodes(directory, usable=nodes, needed=1, excluded=[]) == ("n0", "n1"), "what a node shows itself counts"


@pytest.mark.parametrize(
    ("layout", "ranks", "expected"),
    [
        ({"tensor": 2}, 4, {"tensor": 2, "pipeline": 1}),
        ({"tensor": 2, "pipeline": 2}, 4, {"tensor": 2, "pipeline": 2}),
        ({"tensor": 2, "pipeline": 2}, 2, {"tensor": 2, "pipeline": 1}),
        ({"tensor": 2, "pipeline": 2}, 1, {"tensor": 1, "pipeline": 1}),
        ({"tensor": 1, "pipeline": 2, "context": 2}, 2, {"tensor": 1, "pipeline": 2, "context": 1}),
    ],
)
def test_the_nearest_layout_for_fewer_ranks(
    layout: dict[str, int], ranks: int, expected: dict[str, int], tmp_path: Path, store: Path
) -> None:
    config = load([configuration(tmp_path, store, parallel=layout)])
    found = in_fewer_ranks(config, ranks)
    assert {name: getattr(found.parallel, name) for name in expected} == expected
    assert dataclasses.replace(found, parallel=config.parallel) == config, "nothing else changes"


def test_shrinking_keeps_other_mistakes(tmp_path: Path, store: Path) -> None:
    config: RunConfig = load([configuration(tmp_path, store, run={"name": "a/b"})])
    with pytest.raises(UserError, match=r"run\.name"):
        in_fewer_ranks(config, 2)


@pytest.mark.parametrize(
    ("job", "restart", "refused"), [("7", "1", False), ("7", "0", True), ("8", "1", True), (None, None, True)]
)
def test_a_later_start_of_the_same_job_takes_the_run_over(
    job: str | None, restart: str | None, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from launcher.run_directory import Lock\n"
        f"lock = Lock(Path({str(path)!r})); lock.take('old'); print('held', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "SLURM_JOB_ID": "7", "PYTHONPATH": str(SCRIPTS.parent)}
    frozen = subprocess.Popen(
        [sys.executable, "-P", "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with frozen:
        assert frozen.stdout is not None
        assert frozen.stdout.readline() == "held\n"
        for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restart)):
            if value is not None:
                monkeypatch.setenv(name, value)
        lock = Lock(path)
        try:
            if refused:
                with pytest.raises(UserError, match=r"process \d+ on .* \(Slurm job 7\)"):
                    lock.take("new")
                assert Lock.attempt(path) == "old"
            else:
                Lock.check_free(path)
                lock.take("new")
                assert Lock.attempt(path) == "new"
                assert json.loads(path.read_text())["slurm_restart_count"] == "1"
        finally:
            lock.close()
            frozen.terminate()


@pytest.mark.distributed
@pytest.mark.fault(
    number=6,
    fault="saves take longer than the lead time before the time limit leaves for them",
    holds="said after the first save, and at the start of each later job, with the number that would do",
    back_after="nothing stops",
)
def test_a_lead_time_too_short_for_a_save_is_said(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, store, train={"steps": 3}, checkpoint={"every_steps": 1})
    monkeypatch.setenv("BLOOMERY_LEAD_SECONDS", "1")
    monkeypatch.setenv("BLOOMERY_FAULT", "checkpoint.before_rename:sleep=0.8")
    said = ran("train", config, ranks=2)
    assert said.count("slurm.lead_seconds is 1, and saving has taken") == 1
    assert job_main(["begin", str(config), "train.steps=4", "checkpoint.allow_changes=[train.steps]"]) == 0
    assert re.search(r"saving has taken .* give it \d+ at least", capsys.readouterr().err)
    monkeypatch.setenv("BLOOMERY_LEAD_SECONDS", "60")
    assert lead_time_too_short(RunDirectory(tmp_path / "run").events) is None
