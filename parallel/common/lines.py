"""Append-only files of one JSON object a line: metrics, events, history.

A line is written by one `write` call, so that a killed process leaves at most one torn line at the end; `keep` cuts
it off before anything is appended again.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parallel.common.files import atomic_writer


class JsonLines:
    """One append-only file. Floats round-trip; NaN and infinities are refused (write None)."""

    def __init__(self, path: Path, check: Callable[[], None] | None = None) -> None:
        """`check` is called before each line and may refuse it by an error."""
        self.path = path
        self._check = check

    def append(self, record: dict[str, Any]) -> None:
        """Adds one object as one line and hands it to the operating system."""
        line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        if self._check is not None:
            self._check()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The whole objects; a torn last line is passed over."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrites the file, whole or not at all, with only the wanted objects; cuts off a torn last line."""
        if not self.path.exists():
            return
        records = [record for record in self if wanted(record)]
        with atomic_writer(self.path) as file:
            for record in records:
                file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
