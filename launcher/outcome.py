"""How an attempt ended, in a file: torchrun cannot carry an exit code, a scheduler cannot read a sentence."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.common.files import write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What `outcome.json` holds."""

    attempt: str
    """Token of the start that ended so."""
    exit_code: int
    """0 goal reached; 2 the user's mistake; 75 saved, to be requeued; 130 saved after an interrupt; 1 anything else."""
    message: str
    """One sentence for a person."""
    step: int | None = None
    """Last step that was finished, where there was one."""

    def write(self, path: Path) -> None:
        """Writes the file whole, or not at all."""
        write_json(path, asdict(self))

    @staticmethod
    def read(path: Path) -> "Outcome | None":
        """The outcome in a file; None where there is none, or none that is whole."""
        try:
            return Outcome(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
