"""What Slurm says about a job: `scontrol show job`, read as data."""

import re
import subprocess
from dataclasses import dataclass

_SECONDS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job as the controller knows it."""

    identity: str
    state: str
    """RUNNING, PENDING, COMPLETED, CANCELLED ..."""
    reason: str
    """Why it waits; `None` where it does not."""
    nodes: str
    restarts: int


def find_job(identity: str) -> Job | None:
    """The job; None where the controller does not know it (any more), does not answer, or is none."""
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", identity):
        return None
    try:
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", identity], capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    fields = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", done.stdout.partition("\n")[0]))
    if done.returncode != 0 or "JobState" not in fields:
        return None
    return Job(
        identity=identity,
        state=fields["JobState"],
        reason=fields.get("Reason", "None"),
        nodes=fields.get("NodeList", "").replace("(null)", ""),
        restarts=int(fields.get("Restarts", "0")),
    )
