"""One training job on the test cluster: how it is submitted, watched and compared."""

import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.outcome import Outcome
from launcher.run_directory import RunDirectory
from tests.launcher.tiny import command, configuration, environment
from tests.slurm.cluster import Cluster, until

PATIENCE_SECONDS = 300
"""Longest wait for anything that a healthy job does; imports alone take 10 to 60 s on a loaded machine."""
STEPS = 60
Step = tuple[int, float, str, float]
"""(step, loss, hash of the batch's samples, gradient norm): what must be equal bit for bit."""


def steps_of(run: Path) -> list[Step]:
    """What a run has written down; a step that stands twice, or out of order, is an error."""
    lines = [(line["step"], line["loss"], line["batch_hash"], line["grad_norm"]) for line in RunDirectory(run).metrics]
    assert [line[0] for line in lines] == list(range(1, len(lines) + 1)), "a step stands twice, or is missing"
    return lines


def tiny_run(directory: Path, store: Path, name: str, **sections: Any) -> Path:
    """A configuration in a directory of its own; the length of the run does not change its learning rates."""
    place = directory / name
    place.mkdir(parents=True)
    own: dict[str, Any] = {
        "run": {"name": name, "dir": str(place / "run")},
        "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"schedule": {"name": "constant", "warmup_steps": 2}},
        "checkpoint": {"every_steps": 10, "keep": 4},
        "parallel": {"tensor": 2},
    }
    return configuration(place, store, **{**own, **{key: {**own.get(key, {}), **sections[key]} for key in sections}})


@dataclass(kw_only=True)
class Job:
    """A submitted run."""

    cluster: Cluster
    identity: str
    run: Path

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"(?:^|\s){name}=(\S*)", self.cluster.said("scontrol", "show", "job", "-o", self.identity))
        return found[1] if found else ""

    @property
    def state(self) -> str:
        """RUNNING, PENDING, COMPLETED ..."""
        return self.field("JobState")

    @property
    def exit_code(self) -> int:
        """Of the batch script."""
        return int(self.field("ExitCode").partition(":")[0])

    def reached(self, step: int, *, attempts: int = 1) -> None:
        """Waits until the run has logged a step in at least its so many-th attempt."""

        def there() -> bool:
            # Empty where the controller was too busy to answer.
            assert self.state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", ""), self.told()
            directory = RunDirectory(self.run)
            last = max((line["step"] for line in directory.metrics), default=0)
            return len(list(directory.history)) >= attempts and last >= step

        until(there, PATIENCE_SECONDS, f"step {step} of attempt {attempts} of {self.run}: {self.told()}")

    def ended(self, *states: str) -> None:
        """Waits for the end of the job, in one of these states."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        until(lambda: self.state in over, PATIENCE_SECONDS, f"the end of job {self.identity}: {self.told()}")
        assert self.state in states, self.told()

    def nodes(self) -> list[str]:
        """Where it runs, first node first."""
        return self.cluster.said("scontrol", "show", "hostnames", self.field("NodeList")).split()

    def ranks(self, node: str) -> list[int]:
        """Process ids of the ranks on a node."""
        return self.cluster.processes(node, rf"-u -m launcher train .*{re.escape(self.run.parent.name)}/")

    def told(self) -> str:
        """What the job printed, steps left out."""
        logs = sorted((self.run / "logs").glob("slurm-*.out"))
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        return "\n".join(["", *(line for line in lines if not line.startswith("step "))][-400:])

    def attempts(self) -> list[dict[str, Any]]:
        """The history of the run."""
        return list(RunDirectory(self.run).history)

    def outcome(self) -> Outcome:
        """How the last attempt that had the run ended."""
        found = Outcome.read(RunDirectory(self.run).outcome)
        assert found is not None, self.told()
        return found


def submit(
    cluster: Cluster, config: Path, *words: str, pace_seconds: float = 0.0, fault: str | None = None, **flags: Any
) -> Job:
    """`bloomery submit`; two nodes with one rank each unless flags say otherwise.

    Args:
        cluster: where.
        config: the file.
        words: overrides.
        pace_seconds: every step takes at least so long, so that a fault finds the run under way on an idle machine.
        fault: further points of `parallel.common.faults`.
        flags: of the verb.
    """
    given = {"nodes": 2, "ranks_per_node": 1, "lead_seconds": 60, **flags}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    faults = [f"train.step:sleep={pace_seconds}"] if pace_seconds else []
    variables = {
        **environment(),
        **cluster.environment,
        "BLOOMERY_FAULT": ",".join([*faults, *([fault] if fault else [])]),
    }
    done = subprocess.run(
        command("submit", config, *words, *options),
        env=variables,
        cwd=config.parent,
        text=True,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"submitted job (\d+)", done.stdout)
    assert found, done.stdout
    return Job(cluster=cluster, identity=found[1], run=config.parent / "run")


def measured(what: str, started: float) -> None:
    """Prints how long something took, for the table of faults (`pytest -s`)."""
    print(json.dumps({"what": what, "seconds": round(time.monotonic() - started, 1)}))
