"""Configuration of a Slurm job: what `bloomery submit` asks for, and how a run behaves in its job.

Every value here becomes an argument of `sbatch` or a variable of the job's environment, never a piece of a script; and
every text is held against an allow-list, so that none could become more than it says. Imports without torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from parallel.common.errors import Problem


class Container(StrEnum):
    """Who starts the job's processes in a container image."""

    apptainer = "apptainer"
    pyxis = "pyxis"
    """NVIDIA's plugin of srun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContainerConfig:
    """A container image for the ranks; the host needs nothing but Slurm then."""

    kind: Container | None = None
    """By default none."""
    image: str | None = None
    """A file, or what the container's runtime takes (`docker://...`, `nvcr.io#nvidia/pytorch:25.06-py3`)."""
    mounts: list[str] = field(default_factory=list)
    """SOURCE or SOURCE:TARGET; the directory of the call is needed among them."""
    python: str = "python3"
    """Interpreter in the image that has Bloomery."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """One job. What is None is left to the cluster's own default."""

    nodes: int = 1
    """Nodes of the job."""
    ranks_per_node: int | None = None
    """Ranks on each node; by default its GPUs, else 1."""
    gpus_per_node: str | None = None
    """GPUs of each node: a number, or TYPE:NUMBER."""
    cpus_per_node: int | None = None
    """CPU cores for all the ranks of a node."""
    memory: str | None = None
    """Host memory of each node, such as 200G; 0 is all of it."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    """Features that the nodes must have, such as a100&nvlink."""
    exclude: list[str] = field(default_factory=list)
    """Nodes to stay away from, such as gpu[07-09]."""
    time: str | None = None
    """Time limit: 90m, 12h, 2d, HH:MM:SS or D-HH:MM:SS."""
    lead_seconds: int = 300
    """How long before the time limit the run is asked to save and stop; Slurm may be up to 60 s early."""
    requeue: bool = True
    """Whether a job that was stopped or lost its node waits in the queue again by itself."""
    tries: int = 3
    """Starts in a row that fail at the same step, or before it, before the job gives up."""
    shrink: bool = False
    """Start on fewer nodes where not all are to be had, with the nearest layout that fits: the same samples."""
    environment: list[str] = field(default_factory=list)
    """Names of further environment variables that the job inherits from the call."""
    container: ContainerConfig = field(default_factory=ContainerConfig)


_WORD = (r"[A-Za-z0-9_][A-Za-z0-9._-]*", "letters, digits, `.`, `_` and `-`, beginning with a letter or digit")
_NODES = (r"[A-Za-z0-9_][A-Za-z0-9._,\[\]-]*", "node names such as gpu07 or gpu[07-09]")
_PLACE = (r"[A-Za-z0-9_./~#@:+-]+", "letters, digits and any of `_ . / ~ # @ : + -`")
TEXTS: dict[str, tuple[str, str]] = {
    "partition": (r"[A-Za-z0-9_][A-Za-z0-9._,-]*", "partition names, with commas between several"),
    "account": _WORD,
    "qos": _WORD,
    "reservation": _WORD,
    "gpus_per_node": (r"([A-Za-z0-9_][A-Za-z0-9._-]*:)?[1-9][0-9]*", "a number above 0, or TYPE:NUMBER"),
    "memory": (r"[0-9]+[KMGT]?", "a number of MiB, or with K, M, G or T; 0 is the whole node"),
    "constraint": (r"[A-Za-z0-9_][A-Za-z0-9._,&|*\[\]()-]*", "feature names, joined by `,`, `&` or `|`"),
    "exclude": _NODES,
    "time": (
        r"[1-9][0-9]*[mhd]|([0-9]+-)?[0-9]{1,2}:[0-9]{2}:[0-9]{2}",
        '90m, 12h, 2d, "HH:MM:SS" or "D-HH:MM:SS" (in quotes: YAML takes 12:00:00 for a number)',
    ),
    "environment": (r"[A-Za-z_][A-Za-z0-9_]*", "names of environment variables"),
    "container.image": _PLACE,
    "container.mounts": _PLACE,
    "container.python": _PLACE,
}
"""{field: (what its whole value must match, the same in words)}."""
_POSITIVE = ("nodes", "ranks_per_node", "cpus_per_node", "lead_seconds", "tries")


def slurm_problems(config: SlurmConfig) -> Iterator[Problem]:
    """Everything in the section `slurm` that no job can be made of."""
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and value < 1:
            yield Problem(key=f"slurm.{name}", got=value, legal="a number above 0")
    for key, (pattern, legal) in TEXTS.items():
        holder, name = (config.container, key.partition(".")[2]) if "." in key else (config, key)
        given = getattr(holder, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not re.fullmatch(pattern, value, re.ASCII):
                yield Problem(key=f"slurm.{key}", got=value, legal=legal)
            elif name in ("image", "mounts", "python") and value is not None and ".." in value.split("/"):
                yield Problem(key=f"slurm.{key}", got=value, legal="a path without `..`")
    container = config.container
    if (container.kind is None) != (container.image is None):
        missing = "image" if container.image is None else "kind"
        legal = "a value where the other of container.kind and container.image has one"
        yield Problem(key=f"slurm.container.{missing}", got=None, legal=legal)


def ranks_per_node(config: SlurmConfig) -> int:
    """Ranks that each node starts."""
    if config.ranks_per_node is not None:
        return config.ranks_per_node
    return int(config.gpus_per_node.rpartition(":")[2]) if config.gpus_per_node is not None else 1


def minutes(time: str) -> str:
    """A time limit as sbatch reads it."""
    factors = {"m": 1, "h": 60, "d": 24 * 60}
    return str(int(time[:-1]) * factors[time[-1]]) if time[-1] in factors else time
