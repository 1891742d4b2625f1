"""Copies of committed checkpoints in another place, such as an object store: whatever fsspec has a name for.

Idea: after each commit a thread compares what is whole here with what is whole there, and copies what is missing, the
newest first, its manifest last; so a step without a manifest does not exist there either, and whatever failed is tried
again after the next save. Nothing is ever removed there. Training neither waits for the copies nor stops for an error.
Imports without torch.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from parallel.checkpoint.manifest import MANIFEST, Manifest, whole_manifests

logger = logging.getLogger(__name__)


def place(url: str) -> tuple[Any, str]:
    """The file system of a URL or path, and the path in it.

    Raises:
        ValueError: nobody knows such a URL.
        ImportError: the package that knows it is not installed; the message names it.
    """
    return fsspec.core.url_to_fs(url)


class Mirror:
    """Copies of the checkpoints under one directory; one process makes them."""

    def __init__(self, root: Path, url: str) -> None:
        """Looks at nothing yet.

        Raises:
            ValueError, ImportError: as `place`.
        """
        self._root = root
        self._url = url
        self._files, self._target = place(url)
        self._thread: threading.Thread | None = None
        self._choosing = threading.Lock()
        self._copying: Path | None = None
        self._again = threading.Event()

    def push(self) -> None:
        """Copies what is whole here and not there; returns at once."""
        self._again.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._copy_missing, name="mirror", daemon=True)
            self._thread.start()

    @contextmanager
    def untouched(self) -> Iterator[tuple[Path, ...]]:
        """Inside the block no other step is begun; yields those that are being copied and must not be removed."""
        with self._choosing:
            yield () if self._copying is None else (self._copying,)

    def wait(self, seconds: float) -> None:
        """Returns when everything is copied, or could not be, or the time is up, which is told."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                logger.warning("the copies in %s were not done after %d s; the next save goes on", self._url, seconds)

    def _copy_missing(self) -> None:
        while self._again.is_set():
            self._again.clear()
            for path, manifest in reversed(whole_manifests(self._root).items()):
                if not self._copied(path, manifest):
                    break

    def _copied(self, path: Path, manifest: Manifest) -> bool:
        """Whether the step is there now, or has gone here."""
        try:
            with self._choosing:
                if not path.exists():
                    return True
                self._copying = path
            self._copy(path, manifest)
        except Exception as error:  # whatever a file system over a network may raise
            logger.warning("cannot copy %s to %s: %r; it is tried again at the next save", path, self._url, error)
            return False
        finally:
            self._copying = None
        return True

    def _copy(self, path: Path, manifest: Manifest) -> None:
        own = (path / MANIFEST).read_bytes()
        target = f"{self._target.rstrip('/')}/{path.name}"
        seal = f"{target}/{MANIFEST}"
        if self._files.exists(seal):
            if self._files.cat_file(seal) == own:
                return
            self._files.rm_file(seal)  # of the same step of another run, or of one that went back
        for name, record in manifest.files.items():
            self._files.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path / name), f"{target}/{name}")
            size = self._files.size(f"{target}/{name}")
            if size != record.bytes:
                raise OSError(f"{target}/{name} has {size} bytes after copying, {path / name} has {record.bytes}")
        self._files.pipe_file(seal, own)
        logger.info("copied %s to %s", path.name, self._url)
