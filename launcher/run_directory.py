"""The directory of one run: what stands in it and who may write to it.

    config.yaml  code.json  history.jsonl  metrics.jsonl  events.jsonl  outcome.json  lock  checkpoints/  wandb/  logs/
    evaluation.json  samples.jsonl  report.html      (of `bloomery evaluate`, `generate`, `report`)

Contract: one live process group writes to a run. The lock is an advisory lock of the operating system on the file
`lock`, which a dead process cannot hold; its content names the holder for those who are refused. Only rank 0 writes
here (checkpoints and logs excepted). Imports without torch.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher import config as configuration
from launcher.config import RunConfig
from launcher.length import total_steps
from launcher.outcome import Outcome
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.lines import JsonLines

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
        if not self.config.is_file():
            return {}
        before = configuration.flatten(configuration.to_dict(configuration.load([self.config])))
        now = configuration.flatten(configuration.to_dict(config))
        keys = list(dict.fromkeys((*before, *now)))
        return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}

    def recorded_code(self) -> dict[str, str]:
        """{source file: hash} as the last attempt wrote it down; empty where none did."""
        try:
            return json.loads(self.code.read_text())
        except FileNotFoundError:
            return {}

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


class Records:
    """What an attempt writes down about itself; only rank 0 does."""

    def __init__(self, directory: RunDirectory, *, attempt: str, writes: bool) -> None:
        self._directory = directory
        self._attempt = attempt
        self._writes = writes

    def begin(
        self,
        config: RunConfig,
        *,
        layout: Mapping[str, Any],
        step: int,
        origin: Path | None,
        changes: Mapping[str, tuple[Any, Any]],
        versions: Mapping[str, str],
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
            code: {source file: hash} of what computes.
        """
        if not self._writes:
            return
        directory = self._directory
        for lines in (directory.history, directory.events):
            lines.keep(lambda _: True)
        directory.metrics.keep(lambda record: record["step"] <= step)
        directory.history.append(
            {
                "attempt": self._attempt,
                "time": time.time(),
                "from_step": step,
                "from_checkpoint": None if origin is None else str(origin),
                "changes": {name: list(values) for name, values in changes.items()},
                "layout": dict(layout),
                "versions": dict(versions),
                "job": {"host": socket.gethostname(), "process": os.getpid(), **_slurm()},
            }
        )
        configuration.save(config, directory.config)
        write_json(directory.code, dict(code))
        self.event("started" if step == 0 else "resumed", step=step)

    def event(self, name: str, *, step: int, **facts: Any) -> None:
        """Adds a line to `events.jsonl`."""
        if self._writes:
            known = {"time": time.time(), "event": name, "attempt": self._attempt, "step": step}
            self._directory.events.append({**known, **facts})


class Lock:
    """The right to write to a run, held until the process ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a+")  # noqa: SIM115 - it stays open as long as the lock is held

    def take(self, attempt: str) -> None:
        """Takes the lock and writes who holds it.

        Raises:
            UserError: a live process holds it.
        """
        self._try(fcntl.LOCK_EX, seconds=_PROBE_SECONDS)
        self._file.seek(0)
        self._file.truncate()
        json.dump({"process": os.getpid(), "host": socket.gethostname(), "attempt": attempt}, self._file)
        self._file.flush()

    def close(self) -> None:
        """Lets others have it."""
        self._file.close()

    @staticmethod
    def attempt(path: Path) -> str | None:
        """Token of the attempt that took the lock last."""
        try:
            return json.loads(path.read_text())["attempt"]
        except (OSError, ValueError, KeyError):
            return None

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

    def _try(self, kind: int, *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return fcntl.flock(self._file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
        self._file.seek(0)
        try:
            holder = json.loads(self._file.read())
            who = f"process {holder['process']} on {holder['host']}"
        except (ValueError, KeyError):
            who = "another process"
        self._file.close()
        raise UserError(f"the run {self._path.parent} is being written by {who}: wait until it ends, or stop it.")


def _slurm() -> dict[str, str]:
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID")
    return {name.lower(): os.environ[name] for name in names if name in os.environ}
