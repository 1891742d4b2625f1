"""RUN and CHECKPOINT as a user writes them, to directories. Imports without torch.

RUN is a directory or a name under `runs/`. CHECKPOINT is a step directory, a RUN (its newest whole step) or RUN@STEP.
"""

from dataclasses import dataclass
from pathlib import Path

from launcher import config as configuration
from launcher.config import RunConfig
from launcher.run_directory import RunDirectory
from parallel.checkpoint.manifest import MANIFEST, Manifest, whole_steps
from parallel.common.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole step of a run."""

    run: RunDirectory
    path: Path
    """The step directory."""
    manifest: Manifest

    def config(self) -> RunConfig:
        """The configuration of the run."""
        return configuration.load([self.run.config])


def find_run(text: str) -> RunDirectory:
    """The run that a user named.

    Raises:
        UserError: there is none.
    """
    for candidate in (Path(text), Path("runs") / text):
        if (candidate / "config.yaml").is_file():
            return RunDirectory(candidate)
    known = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    hint = f" ({', '.join(known)})" if known else ""
    raise UserError(f"{text} is not a run: expected a directory with a config.yaml, or a name under runs/{hint}.")


def find_step(text: str) -> Path:
    """The step directory that a user named, wherever it stands.

    Raises:
        UserError: there is none, or it is not whole.
    """
    path = Path(text)
    if (path / MANIFEST).is_file():
        Manifest.read(path)
        return path
    name, at, number = text.rpartition("@")
    run = find_run(name if at else text)
    steps = whole_steps(run.checkpoints)
    if not steps:
        raise UserError(f"the run {run.path} has no checkpoint yet: `bloomery train` saves one at its end, or earlier.")
    wanted = number if at else str(max(steps))
    if not wanted.isdigit() or int(wanted) not in steps:
        raise UserError(f"{text} does not exist: {run.path} has the steps {', '.join(map(str, steps))}.")
    return steps[int(wanted)]


def find_checkpoint(text: str) -> Checkpoint:
    """The checkpoint of a run that a user named.

    Raises:
        UserError: there is none, it is not whole, or it stands outside a run.
    """
    path = find_step(text)
    return Checkpoint(run=find_run(str(path.parent.parent)), path=path, manifest=Manifest.read(path))
