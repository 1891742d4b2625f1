"""Nodes that cost a job an attempt: who says so, and where it is written for the job's next choice of nodes.

A rank that a signal killed (launcher/agent.py), one that hung (the watchdog), a node that failed its preflight. The
batch script names the file, `logs/blame.jsonl` of the run; outside of a job nothing is written. Imports without torch.
"""

import os
import socket
from enum import StrEnum
from pathlib import Path

from parallel.common.lines import JsonLines

BLAME_VARIABLE = "BLOOMERY_BLAME"
"""The file."""


def node_name() -> str:
    """This machine as the scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class Kind(StrEnum):
    """What a node did."""

    killed = "killed"
    hung = "hung"
    slow = "slow"
    """The attempt went on."""
    bad = "bad"
    """Of its own measurements: there is nothing to try again."""


def blame(node: str, cause: str, *, attempt: str | None, kind: Kind) -> None:
    """Notes what a node did to this attempt."""
    if BLAME_VARIABLE in os.environ:
        record = {"attempt": attempt, "host": node, "cause": cause, "kind": kind.value}
        JsonLines(Path(os.environ[BLAME_VARIABLE])).append(record)
