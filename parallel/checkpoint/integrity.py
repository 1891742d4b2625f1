"""Whether a checkpoint's files are those that its manifest lists, byte for byte. Imports without torch."""

from collections.abc import Iterator
from pathlib import Path

from parallel.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest
from parallel.common.files import hash_file


def check_files(path: Path, manifest: Manifest, *, share: int = 0, shares: int = 1) -> None:
    """Refuses the first file that is missing, surplus or damaged.

    Args:
        path: a step directory.
        manifest: its manifest.
        share, shares: names and sizes are compared for all files, hashes for the share-th part of them.

    Raises:
        DamagedCheckpoint: names the file.
    """
    for problem in problems(path, manifest, share=share, shares=shares):
        raise DamagedCheckpoint(problem)


def problems(path: Path, manifest: Manifest, *, share: int = 0, shares: int = 1) -> Iterator[str]:
    """One sentence for each file that is not as it was written; arguments as in `check_files`."""
    there = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir() or file.is_symlink()}
    expected = set(manifest.files) | {MANIFEST}
    for name in sorted(expected - there):
        yield f"{path / name} is missing: the checkpoint is damaged"
    for name in sorted(there - expected):
        yield f"{path / name} is unexpected: it does not belong to the checkpoint"
    for name in sorted(expected & there):
        if (path / name).is_symlink():
            yield f"{path / name} is a link: a checkpoint has only plain files"
    by_size = sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0]))
    for number, (name, record) in enumerate(by_size):
        file = path / name
        if name not in there or file.is_symlink():
            continue
        size = file.stat().st_size
        if size != record.bytes:
            yield f"{file} is damaged: it has {size} bytes instead of {record.bytes}"
        elif number % shares == share and hash_file(file) != record.hash:
            yield f"{file} is damaged: its content does not match the manifest's hash"
