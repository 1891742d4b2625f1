"""Named points at which a test may have the process killed, as a power cut would.

`BLOOMERY_FAULT=checkpoint.before_rename` kills the process with SIGKILL the first time it passes that point,
`BLOOMERY_FAULT=checkpoint.before_rename:3` the third time. Without the variable a point costs one look-up.
"""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def fault_point(name: str) -> None:
    """Dies here if the environment asks for it."""
    wanted, _, count = os.environ.get("BLOOMERY_FAULT", "").partition(":")
    if name == wanted:
        _passed[name] += 1
        if _passed[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)
