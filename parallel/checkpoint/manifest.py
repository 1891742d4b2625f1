"""The manifest: the one file that makes a step directory a checkpoint.

It is written last, after every other file is on the disk and hashed, and lists each of them with size and xxh3-128; it
carries a hash of itself. So a directory is whole exactly if its manifest is, and damage anywhere is found by name.
Imports without torch: listing checkpoints is quick.

    format              1
    step                optimizer steps done
    attempt             the start of the run that wrote it
    layout              parallel degrees and ZeRO stage that wrote it: a record, never needed for loading
    config              the run's configuration, so that a checkpoint alone says what model it holds
    config_fingerprint  xxh3-128 of it as canonical JSON
    versions            of what wrote it
    metrics             {name: number} known at this step, the loss and perhaps the validation loss
    participants        {name: null for JSON state, else the list of its tensors' keys}
    files               {path: {bytes, hash}}, everything in the directory but the manifest
    checksum            xxh3-128 of all of the above as canonical JSON
"""

import json
import logging
import re
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import hash_bytes, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors"

_STEP_NAME = re.compile(r"step-(\d{8,})")
_RECORDED_PACKAGES = ("bloomery", "torch", "megatron-core", "deepspeed")


class DamagedCheckpoint(UserError):
    """A checkpoint is not as it was written; the sentence names the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """What a file must be."""

    bytes: int
    hash: str
    """xxh3-128, 32 hexadecimal digits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a step directory holds; see the module's docstring."""

    step: int
    attempt: str
    layout: dict[str, Any]
    config: dict[str, Any]
    config_fingerprint: str
    versions: dict[str, str]
    metrics: dict[str, float]
    participants: dict[str, list[str] | None]
    files: dict[str, FileRecord]

    def write(self, directory: Path) -> None:
        """Writes `manifest.json` and flushes it and the directory to the disk."""
        content = {"format": FORMAT, **asdict(self)}
        write_json(directory / MANIFEST, {**content, "checksum": fingerprint(content)})

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Reads and checks `manifest.json`.

        Raises:
            DamagedCheckpoint: there is none, it is damaged, or of another step than the directory's name.
            UserError: it is of a newer format.
        """
        path = directory / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            checksum = content.pop("checksum")
            whole = checksum == fingerprint(content)
        except FileNotFoundError:
            raise DamagedCheckpoint(f"{directory} is not a checkpoint: it has no {MANIFEST}") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedCheckpoint(f"{path} is damaged: it cannot be read as a manifest ({error})") from None
        if not whole:
            raise DamagedCheckpoint(f"{path} is damaged: its checksum does not match")
        if content.pop("format") != FORMAT:
            raise UserError(f"{path} is of a format that this version does not know: expected format {FORMAT}")
        files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
        manifest = cls(**content, files=files)
        if directory.name != step_name(manifest.step):
            raise DamagedCheckpoint(
                f"{path} belongs to {step_name(manifest.step)}, not to a directory called {directory.name}"
            )
        return manifest


def fingerprint(value: Any) -> str:
    """xxh3-128 of a JSON value, whatever the order of its keys."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def step_name(step: int) -> str:
    """`step_name(120)` is `step-00000120`."""
    return f"step-{step:08d}"


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a checkpoint; looked up once, for that takes 30 ms."""
    found = {"python": sys.version.split()[0]}
    for name in _RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def step_directories(root: Path) -> dict[int, Path]:
    """{step: directory} of everything under `root` that is called like a step, ascending; whole or not."""
    found = {int(name[1]): path for path in root.glob("step-*") if (name := _STEP_NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def whole_manifests(root: Path) -> dict[Path, Manifest]:
    """{step directory: manifest} of the steps under `root` with a whole manifest, ascending."""
    found: dict[Path, Manifest] = {}
    for path in step_directories(root).values():
        try:
            found[path] = Manifest.read(path)
        except UserError as error:
            logger.warning("%s; it is passed over", error)
    return found


def whole_steps(root: Path) -> dict[int, Path]:
    """{step: directory} of the steps under `root` with a whole manifest, ascending."""
    return {manifest.step: path for path, manifest in whole_manifests(root).items()}
