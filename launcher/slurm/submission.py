"""The line that `bloomery submit` runs: sbatch, its flags, one of the scripts in slurm/, the user's words.

Contract: no value becomes text of a script or of a shell. A flag is one argument, `--name=value`, and its value has
passed `launcher.slurm.config`; the user's words follow the script and reach the ranks as arguments. What a job inherits
from the environment of the call is a list of names: that is the way of secrets too (WANDB_API_KEY, HF_TOKEN), which
therefore stand in no script, no configuration and no line.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.slurm.config import SlurmConfig, minutes
from parallel.common.errors import Problem

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "slurm"
_INHERITED = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TMPDIR|PYTHONPATH|LD_LIBRARY_PATH|VIRTUAL_ENV|CONDA_PREFIX|OMP_NUM_THREADS"
    r"|SLURM_CONF|DS_ACCELERATOR|RAY_ADDRESS|https?_proxy|no_proxy|HTTPS?_PROXY|NO_PROXY|WANDB_\w+|AWS_\w+|GOOGLE_\w+"
    r"|(HF|NCCL|GLOO|TORCH|CUDA|UCX|FI|OFI|TRITON|MASTER|BLOOMERY|APPTAINER|ENROOT|TOKENIZERS|XDG)_\w+"
)
"""Names of variables that a job has a use for."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def control_problems(words: Sequence[str]) -> Iterator[Problem]:
    """Words for the job that no line can show."""
    for word in words:
        if _CONTROL.search(word):
            key = word.partition("=")[0] if "=" in word else "CONFIG"
            yield Problem(key=key, got=word, legal="no control characters, such as line breaks")


def directory_problems(directory: Path) -> Iterator[Problem]:
    """What Slurm would read out of the directory of the run, into which the job's log is written."""
    if _CONTROL.search(str(directory)) or "%" in str(directory) or "\\" in str(directory):
        legal = r"a directory without `%`, `\` and control characters, which mean something to Slurm in a file's name"
        yield Problem(key="run.dir", got=str(directory), legal=legal)
    if ".." in directory.parts:
        yield Problem(key="run.dir", got=str(directory), legal="a directory without `..`")


def inherited(environment: Mapping[str, str], more: Sequence[str]) -> list[str]:
    """Names of the variables that the job inherits, sorted."""
    return sorted({name for name in environment if _INHERITED.fullmatch(name)} | set(more))


def job_environment(config: SlurmConfig, environment: Mapping[str, str], *, sweep: Path | None) -> dict[str, str]:
    """The environment of the sbatch call: settings of the script beside what stood there."""
    settings: dict[str, object] = {
        "BLOOMERY_RANKS_PER_NODE": config.ranks_per_node,
        "BLOOMERY_LEAD_SECONDS": config.lead_seconds,
        "BLOOMERY_REQUEUE": int(config.requeue),
        "BLOOMERY_SWEEP": sweep,
    }
    if config.container.kind is not None:
        settings |= {
            "BLOOMERY_CONTAINER": config.container.kind.value,
            "BLOOMERY_IMAGE": config.container.image,
            "BLOOMERY_MOUNTS": ",".join(config.container.mounts) or None,
            "BLOOMERY_PYTHON": config.container.python,
        }
    else:
        settings["BLOOMERY_PYTHON"] = sys.executable
    given = {name: str(value) for name, value in settings.items() if value is not None}
    kept = {name: value for name, value in environment.items() if name not in settings}
    return {**kept, **given}


def sbatch(
    config: SlurmConfig,
    *,
    script: Path,
    name: str,
    log: Path,
    words: Sequence[str],
    environment: Mapping[str, str],
    chained: bool = False,
    array: str | None = None,
) -> list[str]:
    """The command line.

    Args:
        config: the section `slurm`, without problems.
        script: one of those in slurm/.
        name: of the job.
        log: the job's output.
        words: what follows the script.
        environment: of the call.
        chained: starts only after every earlier job of this name and user has ended.
        array: indices of a job array, `0-7%2`.
    """
    nodes = f"1-{config.nodes}" if config.shrink and config.nodes > 1 else str(config.nodes)
    flags = {
        "job-name": name,
        "nodes": nodes,
        "gpus-per-node": config.gpus_per_node,
        "cpus-per-task": config.cpus_per_node,
        "mem": config.memory,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "reservation": config.reservation,
        "constraint": config.constraint,
        "exclude": ",".join(config.exclude) or None,
        "time": minutes(config.time) if config.time is not None else None,
        "signal": f"B:USR1@{config.lead_seconds}",
        "output": log,
        "open-mode": "append",
        "dependency": "singleton" if chained else None,
        "array": array,
        "export": ",".join(inherited(environment, config.environment)) or "NONE",
    }
    given = [f"--{flag}={value}" for flag, value in flags.items() if value is not None]
    return ["sbatch", "--parsable", *given, "--requeue" if config.requeue else "--no-requeue", str(script), *words]
