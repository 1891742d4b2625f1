"""A command's time, processor time and memory."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def bloomery(*words: object) -> list[str]:
    """A command line of ours."""
    return [sys.executable, "-P", "-m", "launcher", *map(str, words)]


def measured(command: list[str]) -> tuple[dict[str, float], str]:
    """Seconds, user and system seconds of all its processes, highest memory of one; and what it printed.

    Raises:
        SystemExit: it failed, with what it said.
    """
    with tempfile.TemporaryFile() as said:
        begun = time.monotonic()
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": used.ru_maxrss * 1024}, text
