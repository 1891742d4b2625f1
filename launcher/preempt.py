"""Stopping on request: a signal on any rank becomes one answer on all of them, at the same step.

TERM (a scheduler takes the node), USR1 (the time limit is near), INT (Ctrl-C) and HUP (the terminal closed) only raise
a flag. Once a step the ranks take the maximum of their flags, so that all of them save the same step and stop. The
collective carries one integer over gloo on the host: it costs some 100 us a step and never waits for the device.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Preempt:
    """The flag of this rank and the agreement of all."""

    def __init__(self) -> None:
        self._group: ProcessGroup | None = None
        self._received = 0
        self.signal: signal.Signals | None = None
        """What the ranks agreed to stop for."""

    def join(self, group: ProcessGroup | None) -> None:
        """Names the ranks that agree: a group of all of them that works on CPU tensors, or None for a rank alone."""
        self._group = group

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals raise the flag inside the block; a second Ctrl-C ends the process at once."""
        # What a shell ignores for a job in the background (nohup, `&`) stays ignored; a scheduler's signals never do,
        # also where a batch script had to ignore USR1 to keep torchrun alive (`trap '' USR1`).
        before = {number: signal.getsignal(number) for number in SIGNALS}
        from_terminal = (signal.SIGINT, signal.SIGHUP)
        ours = [number for number in SIGNALS if number not in from_terminal or before[number] is not signal.SIG_IGN]
        for number in ours:
            signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number in ours:
                signal.signal(number, before[number])

    def agreed(self) -> bool:
        """Whether some rank was asked to stop; the same on every rank. All ranks call this once a step."""
        received = self._received
        if self._group is not None:
            flag = torch.tensor(received)  # []
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
            received = int(flag)
        if received:
            self.signal = signal.Signals(received)
        return bool(received)

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
