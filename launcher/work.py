"""What a verb's quick half hands to its computing half, and which rank of how many this process is.

Ranks come from the environment: torchrun's names, else srun's, else this process is alone. Imports without torch.
"""

import errno
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError

STARTER_VARIABLE = "BLOOMERY_STARTER"
"""Process id of the `--ranks N` call that started this rank and reports for it."""
ATTEMPT_VARIABLE = "BLOOMERY_ATTEMPT"
"""Token of this start, the same on all ranks of a `--ranks N` call."""
OUTCOME_VARIABLE = "BLOOMERY_OUTCOME"
"""File in which the ranks of a `--ranks N` call say how it ended."""

_MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
_FIRST_PORT, _PORTS = 20000, 20000


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Computing that a verb asks for: `work(job) -> int` of `module`, which may import torch."""

    module: str
    job: Any
    rank: int
    logs: Path
    """Directory for what libraries say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank on this machine: the number of its accelerator."""
    rendezvous: str = "alone"
    """Who started the ranks: `torchrun`, `srun`, or nobody (`alone`)."""
    attempt: str = field(default_factory=lambda: os.environ.get(ATTEMPT_VARIABLE) or secrets.token_hex(8))
    """Token of this start; where nobody handed one over, rank 0's counts."""


def from_environment() -> Ranks:
    """The rank that torchrun or srun gave to this process, or the only one.

    Under srun the address and a port of the first node are put into the environment, as torchrun would have done.
    """
    environment = os.environ
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Ranks(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            rendezvous="torchrun",
        )
    if "SLURM_STEP_NUM_TASKS" in environment and int(environment["SLURM_STEP_NUM_TASKS"]) > 1:
        environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
        environment.setdefault("MASTER_PORT", str(_slurm_port()))
        return Ranks(
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            rendezvous="srun",
        )
    return Ranks()


def is_first_rank() -> bool:
    """Whether this process may speak to the user: it is rank 0 (or alone), and no starter speaks for it."""
    return from_environment().rank == 0 and STARTER_VARIABLE not in os.environ


def as_mistake(error: BaseException) -> UserError | None:
    """What a user can put right, as one sentence; None for everything else, which is our own mistake."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _MENDABLE:
        place = f" ({error.filename})" if error.filename else ""
        return UserError(f"{error.strerror}{place}: make room or give rights, and call again.")
    return None


def _first_host(nodes: str) -> str:
    """`node[03-05,9],other` begins with `node03`."""
    found = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?", nodes)
    if not found:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}: expected a list of node names.")
    return found[1] + (re.split(r"[,-]", found[2])[0] if found[2] else "")


def _slurm_port() -> int:
    """A port that all ranks of a step agree on; a requeued job keeps its id, so the restart count moves it."""
    identity = int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ.get("SLURM_STEP_ID", "0"))
    return _FIRST_PORT + (identity * 31 + int(os.environ.get("SLURM_RESTART_COUNT", "0"))) % _PORTS
