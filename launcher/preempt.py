"""Stopping on request: a signal on any rank becomes one answer on all of them, at the same step.

TERM (a scheduler takes the node), USR1 (the time limit is near), INT (Ctrl-C) and HUP (the terminal closed) only raise
a flag. Once a step the ranks take the maximum of their flags, so that all of them save the same step and stop. The
collective carries a few integers over gloo on the host: it costs some 100 us a step and never waits for the device.
Whatever else each rank knows for itself and all must act on alike rides with it.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.common.faults import fault_point

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def _nothing(_phase: str) -> None:
    """Where nobody watches."""


class Asked(Protocol):
    """Something that is asked on every rank after each step, and answered alike on all."""

    def ask(self) -> bool:
        """What this rank knows."""
        ...

    def answer(self, anywhere: bool) -> None:
        """Whether some rank said yes; an error that is raised here is raised by all ranks at the same step."""
        ...


class Preempt:
    """The flag of this rank and the agreement of all."""

    def __init__(self) -> None:
        self._group: ProcessGroup | None = None
        self._asked: Sequence[Asked] = ()
        self._pulse: Callable[[str], None] = _nothing
        self._received = 0
        self.signal: signal.Signals | None = None
        """What the ranks agreed to stop for."""

    def join(
        self, group: ProcessGroup | None, asked: Sequence[Asked] = (), *, pulse: Callable[[str], None] = _nothing
    ) -> None:
        """Names the ranks that agree: a group of all of them that works on CPU tensors, or None for a rank alone.

        Args:
            group: the ranks.
            asked: what they agree on besides, the same on every rank.
            pulse: told that this rank waits for the others.
        """
        self._group = group
        self._asked = asked
        self._pulse = pulse

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
        fault_point("train.step")
        self._pulse("collective")
        flags = torch.tensor([self._received, *(asked.ask() for asked in self._asked)])  # [1 + asked]
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        received, *answers = flags.tolist()
        for asked, answer in zip(self._asked, answers, strict=True):
            asked.answer(bool(answer))
        if received:
            self.signal = signal.Signals(received)
        return bool(received)

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
