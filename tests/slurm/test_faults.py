"""Faults of a cluster, each done to a real job on a real Slurm.

The oracle: (step, loss, batch hash, gradient norm) of every step equals, bit for bit, what a run wrote down to which
nothing happened. What was cancelled is gone on with by hand first. And nothing of any job is left on any node.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.run_directory import RunDirectory
from parallel.checkpoint.manifest import whole_steps
from tests.launcher.tiny import ran
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import Job, Step, measured, steps_of, submit, tiny_run

pytestmark = pytest.mark.slurm

Undisturbed = Callable[..., list[Step]]


def went_on(job: Job, undisturbed: list[Step], *, attempts: int) -> None:
    """The job reached its goal by itself, with the bits of a run to which nothing happened."""
    job.ended("COMPLETED")
    assert steps_of(job.run) == undisturbed
    assert len(job.attempts()) == attempts, job.told()
    assert job.outcome().exit_code == 0
    until(lambda: not job.cluster.left_over(), 60, f"nothing left: {job.cluster.left_over()}")


def gone_on_with(job: Job, undisturbed: list[Step]) -> None:
    """What a job that is over has left is whole: the same command, by hand, ends with the same bits."""
    ran("train", job.run.parent / "config.yaml", ranks=2)
    assert steps_of(job.run) == undisturbed


@pytest.mark.slow
@pytest.mark.fault(
    number=4,
    fault="`scontrol requeue` while it trains",
    holds="saved and started again, no step lost, the same bits",
    back_after=70.0,
)
@pytest.mark.fault(
    number=8,
    fault="scancel while it trains, and while it waits",
    holds="CANCELLED and stays so, the checkpoint is whole, nothing is left",
    back_after="never: it was cancelled",
)
def test_a_job_is_requeued_and_a_cancelled_one_stays_cancelled(
    cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed
) -> None:
    job = submit(cluster, tiny_run(tmp_path, store, "cancelled"), pace_seconds=0.4)
    job.reached(12)
    cluster.run("scontrol", "requeue", job.identity)
    job.reached(15, attempts=2)
    waiting = submit(cluster, tiny_run(tmp_path, store, "waiting"), nodes=4, cpus_per_node=16)
    assert waiting.state == "PENDING"
    assert [attempt["steps_lost"] for attempt in job.attempts()] == [0, 0]
    cluster.run("scancel", job.identity, waiting.identity)
    for each in (job, waiting):
        each.ended("CANCELLED")
    until(lambda: not cluster.left_over(), 60, f"nothing left: {cluster.left_over()}")
    time.sleep(10)  # a requeued job would wait for 5
    for each, restarts in ((job, "1"), (waiting, "0")):
        assert (each.state, each.field("Restarts")) == ("CANCELLED", restarts)
    assert len(job.attempts()) == 2
    gone_on_with(job, undisturbed())


@pytest.mark.long
@pytest.mark.fault(
    number=8,
    fault="scancel during a save, and between a requeue and the next start",
    holds="CANCELLED and stays so, the checkpoint before or after is whole",
    back_after="never: it was cancelled",
)
def test_a_job_cancelled_at_the_worst_time_stays_cancelled(
    cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed
) -> None:
    saving = submit(cluster, tiny_run(tmp_path, store, "saving"), fault="checkpoint.before_rename:sleep=300")
    requeued = submit(cluster, tiny_run(tmp_path, store, "requeued"), pace_seconds=0.5)
    half = saving.run / "checkpoints"
    requeued.reached(12)
    cluster.run("scontrol", "requeue", requeued.identity)
    until(lambda: requeued.field("Restarts") == "1", 60, "requeued")
    cluster.run("scancel", requeued.identity)
    until(lambda: list(half.glob(".attempt-*/manifest.json")), 300, f"a save under way: {saving.told()}")
    cluster.run("scancel", saving.identity)
    for each in (saving, requeued):
        each.ended("CANCELLED")
    until(lambda: not cluster.left_over(), 60, f"nothing left: {cluster.left_over()}")
    time.sleep(10)
    assert [each.state for each in (saving, requeued)] == ["CANCELLED", "CANCELLED"]
    assert whole_steps(half) == {}, "the half one is not listed"
    for each in (saving, requeued):
        gone_on_with(each, undisturbed())


@pytest.mark.long
@pytest.mark.fault(
    number=5,
    fault="the time limit comes near: USR1, perhaps before the first step",
    holds="all ranks save the same step, no step is lost, requeued, the same bits",
    back_after=129.0,
)
def test_time_limit(cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed) -> None:
    job = submit(cluster, tiny_run(tmp_path, store, "limit"), pace_seconds=1.0, time="3m", lead_seconds=150)
    started = time.monotonic()
    job.reached(2, attempts=2)
    measured("time limit, from submission to the second start", started)
    first, second = job.attempts()[:2]
    assert second["steps_lost"] == 0
    assert second["from_step"] >= 1
    assert first["attempt"].split(".")[:2] == [job.identity, "0"]
    assert second["attempt"].split(".")[:2] == [job.identity, "1"]
    assert "stopped by SIGUSR1" in job.told()
    cluster.run("scancel", job.identity)
    job.ended("CANCELLED")
    gone_on_with(job, undisturbed())


@pytest.mark.long
@pytest.mark.fault(
    number=7,
    fault="a job of a higher partition takes all nodes",
    holds="saved in the grace time, requeued and not FAILED, no step lost, the same bits",
    back_after=29.0,
)
def test_preemption(cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed) -> None:
    job = submit(cluster, tiny_run(tmp_path, store, "preempted"), pace_seconds=0.1)
    job.reached(15)
    started = time.monotonic()
    urgent = ["sbatch", "--parsable", "-p", "high", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3"]
    high = cluster.run(*urgent).stdout.strip()
    job.reached(1, attempts=2)
    measured("preemption, with 3 s of the other job", started)
    assert "JobState=COMPLETED" in cluster.said("scontrol", "show", "job", "-o", high)
    assert job.attempts()[1]["steps_lost"] == 0
    went_on(job, undisturbed(), attempts=2)


@pytest.mark.long
@pytest.mark.fault(
    number=4,
    fault="a node loses power: the one that runs the batch script, or another",
    holds="the job goes on on other nodes, the same bits",
    back_after=82.0,
)
@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_power_cut(which: int, cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed) -> None:
    job = submit(cluster, tiny_run(tmp_path, store, "power"), pace_seconds=0.1)
    job.reached(15)
    lost = job.nodes()[which]
    started = time.monotonic()
    cluster.power_cut(lost)
    job.reached(1, attempts=2)
    measured(f"power cut of node {which}", started)
    assert lost not in job.nodes()
    assert job.attempts()[1]["from_step"] >= 10
    went_on(job, undisturbed(), attempts=2)


@pytest.mark.long
@pytest.mark.fault(
    number=15,
    fault="slurmctld dies and is back after 3 s; then slurmd dies and is back after 3 s",
    holds="the job does not notice",
    back_after="nothing stops",
)
def test_daemons_that_come_back(cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed) -> None:
    job = submit(cluster, tiny_run(tmp_path, store, "daemons"), pace_seconds=0.3)
    job.reached(5)
    node = job.nodes()[1]
    cluster.kill_controller()
    time.sleep(3)
    cluster.start_controller()
    until(lambda: cluster.said("scontrol", "ping").count("UP"), 30, "the controller")
    cluster.kill_slurmd(node)
    time.sleep(3)
    cluster.start_slurmd(node)
    until(lambda: cluster.said("scontrol", "ping").count("UP"), 30, "the controller")
    went_on(job, undisturbed(), attempts=1)
    assert job.field("Restarts") == "0"


@pytest.mark.long
@pytest.mark.fault(
    number=15,
    fault="slurmd dies and does not come back",
    holds="as a lost node: on other nodes, the same bits, no rank is left behind",
    back_after=116.0,
)
def test_a_daemon_that_stays_away(cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed) -> None:
    job = submit(cluster, tiny_run(tmp_path, store, "orphaned"), pace_seconds=0.5)
    job.reached(12)
    lost = job.nodes()[1]
    started = time.monotonic()
    cluster.kill_slurmd(lost)
    job.reached(1, attempts=2)
    measured("slurmd gone for good", started)
    went_on(job, undisturbed(), attempts=2)


@pytest.mark.long
@pytest.mark.fault(
    number=4,
    fault="a rank is killed; then another one on the same node",
    holds="started again at once on the same nodes; then requeued without that node, the same bits",
    back_after=24.0,
)
def test_a_node_that_kills_ranks_is_left_out(
    cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed
) -> None:
    job = submit(cluster, tiny_run(tmp_path, store, "killed"), pace_seconds=0.5)
    job.reached(12)
    bad = job.nodes()[1]
    for attempt in (1, 2):
        started = time.monotonic()
        cluster.kill(job.ranks(bad)[0])
        job.reached(1, attempts=attempt + 1)
        measured(f"rank killed, time {attempt}", started)
    assert bad not in job.nodes()
    assert job.told().count(f"on {bad} was killed by SIGKILL") >= 2
    went_on(job, undisturbed(), attempts=3)


@pytest.mark.long
@pytest.mark.fault(
    number=16,
    fault="a node of the job has no room left for temporary files",
    holds="the preflight names it before the first step; requeued without it, the same bits",
    back_after=148.0,
)
def test_a_bad_node_is_left_out_from_the_start(
    cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    cluster.shrink_disk("node1", scratch)
    monkeypatch.setenv("TMPDIR", str(scratch))
    job = submit(cluster, tiny_run(tmp_path, store, "unfit"))
    until(lambda: job.nodes() == ["node0", "node1"], 60, "it starts there")
    started = time.monotonic()
    job.reached(1)
    measured("bad node, from the start of the job", started)
    assert "node1" not in job.nodes()
    assert "preflight: node1 has 16 MiB of disk for temporary files left" in job.told()
    went_on(job, undisturbed(), attempts=1)


@pytest.mark.long
@pytest.mark.fault(
    number=26,
    fault="every start dies in its first save",
    holds="after slurm.tries starts the job ends with 1 and says why and at which step",
    back_after="stopped, for somebody to mend the cause",
)
def test_a_crash_that_repeats_ends_the_job(cluster: Cluster, tmp_path: Path, store: Path) -> None:
    config = tiny_run(tmp_path, store, "loop")
    job = submit(cluster, config, "slurm.tries=2", fault="checkpoint.before_manifest")
    job.ended("FAILED")
    assert job.exit_code == 1
    assert "2 starts in a row came no further than step 10" in job.told()
    assert "was killed by SIGKILL" in job.told()
    assert len(job.attempts()) == 2


@pytest.mark.long
@pytest.mark.fault(
    number=21,
    fault="a node is lost and no other is there (slurm.shrink)",
    holds="goes on on what is left, the same samples, losses within 1e-5",
    back_after=75.0,
)
def test_shrink(cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed) -> None:
    job = submit(cluster, tiny_run(tmp_path, store, "shrink"), "slurm.shrink=true", pace_seconds=0.1)
    job.reached(15)
    for spare in set(cluster.nodes) - set(job.nodes()):
        cluster.run("scontrol", "update", f"nodename={spare}", "state=drain", "reason=test")
    lost = job.nodes()[0]
    started = time.monotonic()
    cluster.power_cut(lost)
    job.reached(1, attempts=2)
    measured("power cut, on fewer nodes", started)
    job.ended("COMPLETED")
    assert [attempt["layout"]["tensor"] for attempt in job.attempts()] == [2, 1]
    for (step, loss, samples, _), expected in zip(steps_of(job.run), undisturbed(), strict=True):
        assert (step, samples) == (expected[0], expected[2])
        assert loss == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.long
@pytest.mark.fault(
    number=13,
    fault="a node freezes in a save, the job is started elsewhere, the node thaws and its slurmd is dead",
    holds="the stale ranks commit nothing and write nothing into the run, the same bits",
    back_after=102.0,
)
def test_split_brain(cluster: Cluster, tmp_path: Path, store: Path, undisturbed: Undisturbed) -> None:
    config = tiny_run(tmp_path, store, "split")
    job = submit(cluster, config, pace_seconds=0.1, fault="checkpoint.before_rename:sleep=2", nodes=1, ranks_per_node=2)
    half = job.run / "checkpoints"
    job.reached(10)
    until(lambda: list(half.glob(".attempt-*/manifest.json")), 60, "a save under way")
    frozen = job.nodes()[0]
    stale = job.ranks(frozen)
    cluster.freeze(frozen)
    started = time.monotonic()
    job.reached(12, attempts=2)
    measured("node frozen", started)
    assert frozen not in job.nodes()
    cluster.kill_slurmd(frozen)  # else it would end them; so they go on, not knowing
    cluster.thaw(frozen)
    until(lambda: not set(stale) & set(job.ranks(frozen)), 60, "the stale ranks have given up")
    job.ended("COMPLETED")
    # The stale srun wakes up, too, and may end the new start's step, which has the same number: one more try then.
    went_on(job, undisturbed(), attempts=len(job.attempts()))
    first, *others = [attempt["attempt"] for attempt in job.attempts()]
    saved = {event["attempt"] for event in RunDirectory(job.run).events if event["event"] == "saved"}
    assert first not in saved
    assert saved <= set(others)
