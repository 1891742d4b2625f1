"""Memory of a process that converts a model larger than it: what is freed goes back to the system at once.

glibc takes large blocks from the system one by one, but each such block that is freed raises the size from which on it
does so, up to 32 MB. Then a layer's matrices come from the heap, where a small object behind each keeps it from
shrinking: 20 MB a layer of a 1 B model, for ever. A fixed size turns that off, and costs only that pages are new again.
"""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
_LARGE_BYTES = 1 << 20


def return_large_blocks() -> None:
    """For the rest of this process; nothing happens where the C library is not glibc."""
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
