"""`--debug-rank R`: Python's debugger on one rank of many, over a socket of its own machine.

    bloomery train my-run.yaml --ranks 4 --debug-rank 2
    nc 127.0.0.1 44444                       # in another terminal of rank 2's machine; the rank says the port

The rank stops before its first step, and again where it fails, before the other ranks hear of it. They wait in their
next collective, and give up after its limit of ten minutes: set a breakpoint (`b parallel/engine.py:170`) and go on
(`c`) rather than think at the first prompt. Only this machine can connect, and whoever does can run anything as the
user: the port opens for no run but one that asks for it.
"""

import logging
import pdb  # noqa: T100 - it is what this module is for
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def debugged(rank: int, *, wanted: int | None) -> Iterator[None]:
    """A debugger for the block, if this rank is the one that it is wanted on: at its begin, and at an error in it."""
    if rank != wanted:
        yield
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        logger.warning("rank %d waits for a debugger: nc 127.0.0.1 %d", rank, server.getsockname()[1])
        connection, _ = server.accept()
    with connection, connection.makefile("r") as read, connection.makefile("w") as write:
        debugger = pdb.Pdb(stdin=read, stdout=write, nosigint=True)
        debugger.prompt = f"(rank {rank}) "
        try:
            debugger.set_trace(_caller())
            yield
        except Exception as error:
            write.write(f"\n{type(error).__name__}: {error}\n")
            debugger.reset()
            debugger.interaction(None, error.__traceback__)
            raise
        finally:
            debugger.set_continue()


def _caller() -> FrameType:
    """Whoever's `with` this is: behind this function, the context manager and contextlib's part of it."""
    return sys._getframe(3)
