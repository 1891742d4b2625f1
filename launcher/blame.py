"""Nodes that cost a job an attempt: who says so, and where it is written for the job's next choice of nodes.

A rank that a signal killed (launcher/agent.py), one that hung (the watchdog), a node that failed its preflight. The
batch script names the file, `logs/blame.jsonl` of the run; outside of a job nothing is written. Imports without torch.
"""

import os
import socket
from pathlib import Path

from parallel.common.lines import JsonLines

BLAME_VARIABLE = "BLOOMERY_BLAME"
"""The file."""


def node_name() -> str:
    """This machine as the scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def blame(node: str, cause: str, *, attempt: str | None) -> None:
    """Notes that a node cost this attempt, and why."""
    if BLAME_VARIABLE in os.environ:
        JsonLines(Path(os.environ[BLAME_VARIABLE])).append({"attempt": attempt, "host": node, "cause": cause})
