"""Named points at which a test may have something happen to the process that happens to processes.

`BLOOMERY_FAULT=POINT[:NUMBER][:WHAT]`, several with commas between them; from the NUMBER-th time on that the process
passes POINT (by default the first), WHAT happens there:

    kill          SIGKILL, as a power cut would (where nothing stands)
    sleep=2.5     it waits so many seconds
    error=EIO     the operating system's error of that name is raised
    memory=16     from there on the process gets so many MiB more, and no byte beyond

Without the variable a point costs one look-up.
"""

import errno
import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path

_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Dies, waits, fails or starves here if the environment asks for it."""
    asked = os.environ.get("BLOOMERY_FAULT")
    if not asked:
        return
    for fault in asked.split(","):
        wanted, *words = fault.split(":")
        if wanted != name:
            continue
        number = int(words.pop(0)) if words and words[0].isdigit() else 1
        _passed[fault] += 1
        if _passed[fault] >= number:
            _happen(words[0] if words else "kill", name)


def _happen(what: str, name: str) -> None:
    word, _, value = what.partition("=")
    if word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif word == "sleep":
        time.sleep(float(value))
    elif word == "error":
        code = getattr(errno, value)
        raise OSError(code, os.strerror(code), name)
    elif word == "memory" and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (int(value) << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    elif word != "memory":
        raise ValueError(f"BLOOMERY_FAULT: there is no fault {what}")
