"""Named points at which a test may have the process killed, as a power cut would, or held up.

`BLOOMERY_FAULT=checkpoint.before_rename` kills the process with SIGKILL the first time it passes that point,
`BLOOMERY_FAULT=checkpoint.before_rename:3` the third time; `BLOOMERY_FAULT=checkpoint.before_rename:sleep=2.5` makes it
wait there so many seconds, each time. Several stand with commas between them. Without the variable a point costs one
look-up.
"""

import os
import signal
import time
from collections import Counter

_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Dies or waits here if the environment asks for it."""
    asked = os.environ.get("BLOOMERY_FAULT")
    if not asked:
        return
    for wanted, _, what in (fault.partition(":") for fault in asked.split(",")):
        if name != wanted:
            continue
        if what.startswith("sleep="):
            time.sleep(float(what.removeprefix("sleep=")))
            continue
        _passed[name] += 1
        if _passed[name] == int(what or 1):
            os.kill(os.getpid(), signal.SIGKILL)
