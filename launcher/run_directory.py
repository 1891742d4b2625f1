"""The directory of one run: what stands in it and who may write to it.

    config.yaml  code.json  history.jsonl  metrics.jsonl  events.jsonl  outcome.json  lock  checkpoints/  wandb/  logs/
    logs/jobs.jsonl  evaluation.json  tasks.jsonl  samples.jsonl  report.html    (of `submit`, `evaluate` (two),
    `generate`, `report`)
    prediction.json  profile/  tensorboard/    (predicted beside measured; where asked for)

Contract: one live process group writes to a run. The lock is an advisory lock of the operating system on the file
`lock`, which a dead process cannot hold; its content names the holder for those who are refused. Only rank 0 writes
here (checkpoints and logs excepted). Imports without torch.
"""

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from launcher import config as configuration
from launcher.config import RunConfig
from launcher.length import total_steps
from launcher.outcome import Outcome
from launcher.slurm.lead import lead_time_too_short
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.lines import JsonLines

logger = logging.getLogger(__name__)

TASK = "task"
"""The event that a checkpoint's figures of a task were found: `task` is its name, `figures` has them by name."""
_PROBE_SECONDS = 1.0
"""Whoever only looks whether the lock is free holds it, shared, for an instant."""


class RunDirectory:
    """Paths and records of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.code = path / "code.json"
        self.outcome = path / "outcome.json"
        self.lock = path / "lock"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.history = JsonLines(path / "history.jsonl")
        self.events = JsonLines(path / "events.jsonl")
        self.samples = JsonLines(path / "samples.jsonl")
        self.tasks = JsonLines(path / "tasks.jsonl")
        self.prediction = path / "prediction.json"
        self.profile = path / "profile"
        self.tensorboard = path / "tensorboard"
        self.jobs = JsonLines(self.logs / "jobs.jsonl")

    def has_checkpoint(self) -> bool:
        """Whether some step was saved: from then on the configuration is what the run is."""
        return any(self.checkpoints.glob("step-*"))

    def finished(self, config: RunConfig) -> bool:
        """Whether the last step of this configuration was reached and saved."""
        outcome = Outcome.read(self.outcome)
        steps = total_steps(config)
        saved = (self.checkpoints / f"step-{steps:08d}" / "manifest.json").is_file()
        return outcome is not None and outcome.exit_code == 0 and outcome.step == steps and saved

    def differences(self, config: RunConfig) -> dict[str, tuple[Any, Any]]:
        """{key: (value in the run, value now)} of everything that differs from the run's configuration."""
        content = self.config.read_bytes() if self.config.is_file() else None
        if content is None or content == configuration.as_yaml(config).encode():
            return {}
        before = _recorded(self.config, content)
        now = configuration.flatten(configuration.to_dict(config))
        keys = list(dict.fromkeys((*before, *now)))
        return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}

    def recorded_code(self) -> dict[str, str]:
        """{source file: hash} as the last attempt wrote it down; empty where none did."""
        try:
            return json.loads(self.code.read_text())
        except FileNotFoundError:
            return {}

    def hosts(self, attempt: str) -> dict[int, str]:
        """{rank: host} of an attempt that has begun; empty for another."""
        found = next((line for line in self.history if line["attempt"] == attempt), None)
        return {rank: host for host, ranks in found.get("hosts", {}).items() for rank in ranks} if found else {}

    def check_not_lost(self) -> None:
        """Refuses a run that has saved, and whose checkpoints are gone: it would begin again from random weights.

        Raises:
            UserError: names the last step that was saved.
        """
        if self.has_checkpoint():
            return
        saved = [event["step"] for event in self.events if event["event"] == "saved"]
        if saved:
            raise UserError(
                f"the run {self.path} has saved step {saved[-1]}, and {self.checkpoints} has no checkpoint any more: "
                "restore one, or take a new run.name to begin again."
            )


@cache
def _recorded(file: Path, _content: bytes) -> dict[str, Any]:
    """Every key of a recorded configuration of this content; to read it takes 60 ms, and a start asks three times."""
    return configuration.flatten(configuration.to_dict(configuration.load([file])))


class Records:
    """What an attempt writes down about itself; only rank 0 does."""

    def __init__(self, directory: RunDirectory, *, attempt: str, writes: bool) -> None:
        self._directory = directory
        self._attempt = attempt
        self._writes = writes
        self._said_short = False

    def begin(
        self,
        config: RunConfig,
        *,
        layout: Mapping[str, Any],
        step: int,
        origin: Path | None,
        changes: Mapping[str, tuple[Any, Any]],
        versions: Mapping[str, str],
        hosts: Sequence[str],
        code: Mapping[str, str],
    ) -> None:
        """Opens the records for an attempt.

        Args:
            config: what it runs.
            layout: record of the parallel degrees.
            step: the step that it goes on after; later metrics are cut off.
            origin: the step directory that it begins with, if any.
            changes: {name: (before, now)} since the last attempt.
            versions: of the packages that compute.
            hosts: where each rank runs.
            code: {source file: hash} of what computes.
        """
        if not self._writes:
            return
        directory = self._directory
        for lines in (directory.history, directory.events):
            lines.keep(lambda _: True)
        reached = max((record["step"] for record in directory.metrics), default=0)
        directory.metrics.keep(lambda record: record["step"] <= step)
        directory.history.append(
            {
                "attempt": self._attempt,
                "time": time.time(),
                "from_step": step,
                "steps_lost": max(0, reached - step),
                "from_checkpoint": None if origin is None else str(origin),
                "changes": {name: list(values) for name, values in changes.items()},
                "layout": dict(layout),
                "versions": dict(versions),
                "hosts": {
                    name: [rank for rank, host in enumerate(hosts) if host == name] for name in dict.fromkeys(hosts)
                },
                "job": {"host": socket.gethostname(), "process": os.getpid(), **_slurm()},
            }
        )
        configuration.save(config, directory.config)
        write_json(directory.code, dict(code))
        self.event("started" if step == 0 else "resumed", step=step)

    def saved(self, *, step: int, **facts: Any) -> None:
        """Notes that a checkpoint is whole, and says where saving takes longer than a stop leaves time for."""
        self.event("saved", step=step, **facts)
        short = lead_time_too_short(self._directory.events) if self._writes else None
        if short is not None and not self._said_short:
            logger.warning("%s", short)
            self._said_short = True

    def went_back(self, *, step: int, **facts: Any) -> None:
        """The run went back to a step: metrics of later ones are cut off, the event keeps the facts."""
        if self._writes:
            self._directory.metrics.keep(lambda record: record["step"] <= step)
        self.event("rolled_back", step=step, **facts)

    def event(self, name: str, *, step: int, **facts: Any) -> None:
        """Adds a line to `events.jsonl`."""
        if self._writes:
            known = {"time": time.time(), "event": name, "attempt": self._attempt, "step": step}
            self._directory.events.append({**known, **facts})


class Lock:
    """The right to write to a run, held until the process ends.

    Under Slurm a process may be over and not know it: its node froze, and the job was started anew. The operating
    system, or a file server, may hold its lock for ever. So a later start of the same job takes the run over, past the
    lock; the older start can no longer commit (`parallel.checkpoint.fence`).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a+")  # noqa: SIM115 - it stays open as long as the lock is held

    def take(self, attempt: str) -> None:
        """Takes the lock and writes who holds it.

        Raises:
            UserError: a live process holds it.
        """
        if not self._try(fcntl.LOCK_EX, seconds=_PROBE_SECONDS):
            logger.warning("taking the run over from an earlier start of this job, which Slurm has given up")
            self._path.unlink(missing_ok=True)
            self._file = open(self._path, "a+")  # noqa: SIM115
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.seek(0)
        self._file.truncate()
        json.dump({"process": os.getpid(), "host": socket.gethostname(), "attempt": attempt, **_slurm()}, self._file)
        self._file.flush()

    def close(self) -> None:
        """Lets others have it."""
        self._file.close()

    @staticmethod
    def holder(path: Path) -> dict[str, Any]:
        """Who took the lock last; empty where nobody can tell."""
        try:
            holder = json.loads(path.read_text())
            return holder if isinstance(holder, dict) else {}
        except (OSError, ValueError):
            return {}

    @classmethod
    def attempt(cls, path: Path) -> str | None:
        """Token of the attempt that took the lock last."""
        return cls.holder(path).get("attempt")

    @classmethod
    def check_free(cls, path: Path) -> None:
        """Refuses at once where a live process holds the lock; takes nothing.

        Raises:
            UserError: names the holder.
        """
        if path.is_file():
            lock = cls(path)
            try:
                lock._try(fcntl.LOCK_SH, seconds=0)
            finally:
                lock.close()

    @classmethod
    def held(cls, path: Path) -> bool:
        """Whether some process holds the lock; a look, nothing more."""
        try:
            with open(path) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            pass
        return False

    def _try(self, kind: int, *, seconds: float) -> bool:
        """Whether the lock was got; if not, its holder is an earlier start of this job, which is over."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._file, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
        self._file.close()
        holder = self.holder(self._path)
        if _earlier_start(holder):
            return False
        who = f"process {holder['process']} on {holder['host']}" if "process" in holder else "another process"
        job = f" (Slurm job {holder['slurm_job_id']})" if "slurm_job_id" in holder else ""
        raise UserError(f"the run {self._path.parent} is being written by {who}{job}: wait until it ends, or stop it.")


def _earlier_start(holder: Mapping[str, Any]) -> bool:
    """Whether a lock was taken by this very Slurm job, before it was requeued or its ranks were started again."""
    own = _slurm()
    job = "slurm_job_id"
    return job in own and own[job] == holder.get(job) and _start(own) > _start(holder)


def _start(slurm: Mapping[str, Any]) -> tuple[int, int]:
    return int(slurm.get("slurm_restart_count", 0)), int(slurm.get("bloomery_try", 0))


def _slurm() -> dict[str, str]:
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID", "BLOOMERY_TRY")
    return {name.lower(): os.environ[name] for name in names if name in os.environ}
