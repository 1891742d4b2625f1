"""Stages on disk: each is a directory that is whole or absent, and is made again only where something changed.

    STORE/stages/NAME/             the stage's files, and manifest.json, written last
    STORE/stages/.NAME.partial/    being written; renamed to NAME as the commit, removed by the next build

A stage's fingerprint covers its name, its version, its settings and the fingerprints of what it reads; a stage whose
directory bears the wanted fingerprint, with every file at its size, is reused. Pages of the Parquet files carry
checksums, so damage inside a file is met when it is read.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import hash_bytes, sync_directory, write_json
from parallel.common.units import format_bytes

_VERSIONS = {
    "read": 1,
    "clean": 1,
    "filters": 1,
    "exact": 1,
    "near": 1,
    "decontaminate": 1,
    "split": 1,
    "tokenizer": 1,
    "store": 1,
}
"""Raised with every change of what a stage makes of the same input."""
_MANIFEST = "manifest.json"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A finished stage."""

    directory: Path
    fingerprint: str
    outcome: dict[str, Any]
    """What the stage's function returned: counts, and whatever the next stages want to know."""
    reused: bool


def fingerprint_of(stage: str, settings: Any, inputs: Iterable[str]) -> str:
    """The fingerprint of a stage's output, known before the stage runs."""
    return hash_bytes(json.dumps([stage, _VERSIONS[stage], settings, list(inputs)], sort_keys=True).encode())


def require_space(directory: Path, needed_bytes: int, stage: str) -> None:
    """Stops before a disk runs full.

    Raises:
        UserError: less is free than the stage will write.
    """
    free = shutil.disk_usage(directory).free
    if free < needed_bytes:
        raise UserError(
            f"the stage {stage} writes about {format_bytes(needed_bytes)} to {directory}, where only "
            f"{format_bytes(free)} are free: make room, or give another data.store"
        )


@contextmanager
def room_on_disk(directory: Path, stage: str) -> Iterator[None]:
    """Says plainly that a disk ran full after all."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        raise UserError(
            f"the disk of {directory.parent} ran full in the stage {stage}: make room and run the same command again"
        ) from error


class Workspace:
    """The stages of one store."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".*"):
            shutil.rmtree(leftover)

    def run(
        self,
        stage: str,
        fingerprint: str,
        work: Callable[[Path], dict[str, Any]],
        *,
        needed_bytes: int,
    ) -> Stage:
        """Reuses a stage, or lets `work` write its files into an empty directory and commits what it wrote.

        Raises:
            UserError: the disk is full, or less is free than `needed_bytes`.
        """
        found = self.find(stage)
        if found is not None and found.fingerprint == fingerprint:
            return found
        require_space(self.directory, needed_bytes, stage)
        partial = self.directory / f".{stage}.partial"
        partial.mkdir()
        try:
            with room_on_disk(partial, stage):
                outcome = work(partial)
                self._commit(stage, partial, {"stage": stage, "fingerprint": fingerprint, "outcome": outcome})
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Stage(directory=self.directory / stage, fingerprint=fingerprint, outcome=outcome, reused=False)

    def find(self, stage: str) -> Stage | None:
        """A finished stage whose files are all there; None where it is missing or damaged."""
        directory = self.directory / stage
        try:
            manifest = json.loads((directory / _MANIFEST).read_bytes())
            whole = all((directory / name).stat().st_size == size for name, size in manifest["files"].items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not whole:
            return None
        return Stage(directory=directory, fingerprint=manifest["fingerprint"], outcome=manifest["outcome"], reused=True)

    def relabel(self, stage: str, fingerprint: str) -> None:
        """Gives a finished stage the fingerprint of other inputs that were found to hold the same documents."""
        file = self.directory / stage / _MANIFEST
        write_json(file, {**json.loads(file.read_bytes()), "fingerprint": fingerprint})

    def _commit(self, stage: str, partial: Path, manifest: dict[str, Any]) -> None:
        final = self.directory / stage
        write_manifest(partial, manifest)
        if final.exists():
            old = self.directory / f".{stage}.old"
            final.rename(old)
            shutil.rmtree(old)
        partial.rename(final)
        sync_directory(self.directory)


def write_manifest(partial: Path, manifest: dict[str, Any]) -> None:
    """Flushes the files of a directory and writes its manifest, which says how large each is."""
    files = sorted(partial.iterdir())
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    manifest["files"] = {file.name: file.stat().st_size for file in files}
    write_json(partial / _MANIFEST, manifest)


def commit_directory(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Gives a directory its manifest and its name, which is not taken; the rename is the commit."""
    write_manifest(partial, manifest)
    partial.rename(final)
    sync_directory(final.parent)
