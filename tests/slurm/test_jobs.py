"""Jobs to which nothing bad happens, and those that must never begin."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.slurm.submission import SCRIPTS
from tests.launcher.tiny import command, environment, ran, texts
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import PATIENCE_SECONDS, Job, Step, measured, steps_of, submit, tiny_run

pytestmark = pytest.mark.slurm

CANARY = "canary-4711-secret"


@pytest.mark.long
@pytest.mark.fault(
    number=4,
    fault="`scontrol requeue` while it trains, on two nodes with two ranks each",
    holds="saved and started again, no step lost, the same bits",
    back_after=70.0,
)
@pytest.mark.fault(
    number=30,
    fault="secrets in the environment of a submitted run",
    holds="its ranks have them; no log, record, checkpoint, configuration or batch script does",
    back_after="nothing stops",
)
def test_two_nodes_with_two_ranks_each_and_a_requeue(
    cluster: Cluster,
    tmp_path: Path,
    store: Path,
    undisturbed: Callable[..., list[Step]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    tracking = {"wandb": {"mode": "offline"}}
    job = submit(cluster, tiny_run(tmp_path, store, "plain", tracking=tracking), ranks_per_node=2, pace_seconds=0.1)
    started = time.monotonic()
    job.reached(1)
    measured("from submission to the first step", started)
    asked = command("status", job.run, "--json", tmp_path / "status.json")
    told = cluster.run(*asked, env=environment())
    assert told.returncode == 0, told.stderr
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "running"
    assert status["job"].startswith(f"{job.identity} (RUNNING")
    job.reached(12)
    started = time.monotonic()
    cluster.run("scontrol", "requeue", job.identity)
    job.reached(1, attempts=2)
    measured("requeue", started)
    job.ended("COMPLETED")
    assert steps_of(job.run) == undisturbed(ranks=4)
    assert [attempt["steps_lost"] for attempt in job.attempts()] == [0, 0]
    assert job.field("Restarts") == "1"
    assert job.attempts()[0]["layout"]["tensor"] == job.attempts()[0]["layout"]["data"] == 2
    until(lambda: not cluster.left_over(), 30, f"nothing left: {cluster.left_over()}")
    script = tmp_path / "script"
    cluster.run("scontrol", "write", "batch_script", job.identity, str(script))
    assert "launcher.agent" in script.read_text()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []


@pytest.mark.fault(
    number=29,
    fault="shell text in the words of a job that was submitted past `bloomery submit`",
    holds="it reaches the ranks as a value and is refused there; nothing runs, nothing is written elsewhere",
    back_after="refused",
)
def test_words_of_a_job_are_words(cluster: Cluster, tmp_path: Path, store: Path) -> None:
    config = tiny_run(tmp_path, store, "hostile")
    words = [str(config), f"run.name=$(touch {tmp_path}/pwned)", f"run.dir={tmp_path}/`touch {tmp_path}/pwned`"]
    done = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--job-name=../evil", str(SCRIPTS / "train.sbatch"), *words,
        cwd=tmp_path, env={**environment(), **cluster.environment, "BLOOMERY_PYTHON": os.sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = Job(cluster=cluster, identity=done.stdout.strip(), run=tmp_path / "run")
    job.ended("FAILED")
    assert job.exit_code == 2
    assert "run.name is '$(touch" in (tmp_path / f"bloomery-{job.identity}.out").read_text()
    assert not (tmp_path / "pwned").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"bloomery-{job.identity}.out", "hostile"]


@pytest.mark.long
@pytest.mark.fault(
    number=14,
    fault="two jobs are submitted for one run",
    holds="the second is refused at once, exit code 2, and told whose job has it; the first goes on",
    back_after="nothing stops: the first job has the run",
)
def test_the_second_job_on_a_run_is_refused(
    cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Callable[..., list[Step]]
) -> None:
    config = tiny_run(tmp_path, store, "both")
    first = submit(cluster, config, pace_seconds=0.2)
    first.reached(5)
    second = submit(cluster, config)
    second.ended("FAILED")
    assert second.exit_code == 2
    log = (second.run / "logs" / f"slurm-{second.identity}.out").read_text()
    assert "is being written by process" in log
    assert f"(Slurm job {first.identity})" in log
    first.ended("COMPLETED")
    assert steps_of(first.run) == undisturbed()


@pytest.mark.long
def test_a_chain_goes_on_and_ends_with_the_run(
    cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Callable[..., list[Step]]
) -> None:
    config = tiny_run(tmp_path, store, "chain")
    last = submit(cluster, config, "slurm.requeue=false", pace_seconds=0.2, chain=3)
    jobs = [Job(cluster=cluster, identity=str(int(last.identity) + more), run=last.run) for more in range(3)]
    jobs[0].reached(5)
    assert [job.state for job in jobs[1:]] == ["PENDING", "PENDING"]
    cluster.run("scancel", "--batch", "--signal=USR1", jobs[0].identity)
    jobs[0].ended("FAILED")
    assert jobs[0].exit_code == 75, "saved, and the goal was not reached"
    jobs[1].ended("COMPLETED")
    jobs[2].ended("COMPLETED")
    assert steps_of(last.run) == undisturbed()
    assert [attempt["job"]["slurm_job_id"] for attempt in last.attempts()] == [job.identity for job in jobs[:2]]


@pytest.mark.long
def test_a_sweep_is_an_array_of_runs(cluster: Cluster, tmp_path: Path, store: Path) -> None:
    config = tiny_run(tmp_path, store, "sweep", train={"steps": 3})
    sweep = tmp_path / "rates.txt"
    rates = (0.01, 0.001)
    sweep.write_text("".join(f"run.name=r{at} run.dir={tmp_path}/r{at} optimizer.learning_rate={at}\n" for at in rates))
    job = submit(cluster, config, nodes=1, ranks_per_node=2, sweep=sweep, at_once=2)
    for rate in rates:
        directory = tmp_path / f"r{rate}"
        until(lambda at=directory: (at / "outcome.json").exists(), PATIENCE_SECONDS, f"{directory}: {job.told()}")
        assert json.loads((directory / "outcome.json").read_text())["exit_code"] == 0
        assert f"learning_rate: {rate}" in (directory / "config.yaml").read_text()


@pytest.mark.long
def test_evaluate_and_data_build_are_jobs_too(cluster: Cluster, tmp_path: Path, store: Path) -> None:
    config = tiny_run(tmp_path, store, "looked-at", train={"steps": 3})
    ran("train", config, ranks=2)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts("data", 400)))
    build = tmp_path / "build.yaml"
    source = f"{{name: words, path: [{corpus}], format: jsonl}}"
    build.write_text(f"data: {{sources: [{source}], store: {tmp_path}/built, tokenizer: {{vocabulary_size: 384}}}}\n")
    variables = {**environment(), **cluster.environment, "BLOOMERY_PYTHON": os.sys.executable}
    jobs = []
    for script, word in (("evaluate.sbatch", str(config.parent / "run")), ("data.sbatch", str(build))):
        line = ["sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/{script}.out", str(SCRIPTS / script), word]
        done = cluster.run(*line, cwd=tmp_path, env=variables)
        assert done.returncode == 0, done.stderr
        jobs.append((Job(cluster=cluster, identity=done.stdout.strip(), run=config.parent / "run"), script))
    for job, script in jobs:
        until(lambda at=job: at.state not in ("PENDING", "RUNNING", "COMPLETING"), PATIENCE_SECONDS, script)
        assert job.state == "COMPLETED", (tmp_path / f"{script}.out").read_text()
    assert (config.parent / "run" / "evaluation.json").is_file()
    assert "2 nodes with" in (tmp_path / "data.sbatch.out").read_text()
    assert (tmp_path / "built" / "manifest.jsonl").is_file()
    until(lambda: not cluster.left_over(), 60, f"nothing left: {cluster.left_over()}")
