"""Gloo worlds on this machine: a function on N ranks for 0.2 seconds.

Idea: the ranks are forked from a parent that has imported torch, megatron-core and DeepSpeed once (7 seconds; by spawn
each rank would pay for it again). They meet through a file, so that no port can be taken.

Contract: a world ends. A rank that raises has its exception raised here with the rank's traceback as a note; a
rank that dies is a `RankDied`; a world that is not done after `seconds` is a `WorldTimeout` with the stack of every
rank that was stuck. No process outlives the call or its parent, and none is ended but by its own id.

Trade-off: a fork copies the parent's threads' locks but not its threads. So the parent must not have run OpenMP
regions with several threads (`bloomery verify` and the tests set OMP_NUM_THREADS=1) nor hold a process group itself.
"""

import faulthandler
import gc
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.lifetime import die_with_parent

_GRACE_SECONDS = 5.0
"""After a first failure, the time that the other ranks have to fail by themselves."""


class RankDied(Exception):
    """A rank ended without an answer; `ranks` maps rank to wait status (negative: the signal)."""

    def __init__(self, ranks: dict[int, int]) -> None:
        self.ranks = ranks
        super().__init__(", ".join(f"rank {rank} ended with status {status}" for rank, status in ranks.items()))


class WorldTimeout(Exception):
    """A world was not done in time; the message names the stuck ranks and shows their stacks."""


@dataclass(slots=True)
class _Rank:
    """The parent's side of one rank."""

    number: int
    pid: int
    pipe: Connection
    stacks: Path
    answer: tuple[bool, Any] | None = None
    status: int | None = None
    arrival: float = 0.0

    def receive(self) -> None:
        """Takes the rank's answer, or its end; blocks until there is one of them."""
        with suppress(EOFError, ConnectionResetError):
            self.answer = pickle.loads(self.pipe.recv_bytes())
        self.arrival = time.monotonic()
        self.pipe.close()
        if self.answer is None:
            self.reap()

    def reap(self) -> None:
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def stack(self) -> str:
        """The Python stacks of a rank that still runs."""
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self.stacks.read_text() or "no stack: the process did not answer\n"


def run_world(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 60) -> list[Any]:
    """Calls `function(*args)` on `world_size` gloo ranks and returns each rank's result, in the order of the ranks.

    `torch.distributed` is initialised when the function starts, and RANK, LOCAL_RANK, WORLD_SIZE are set as torchrun
    sets them. The function may be a closure; its result must be picklable.

    Raises:
        RankDied: a rank was killed or called `os._exit`.
        WorldTimeout: the world was not done after `seconds`.
        Exception: whatever the first failing rank raised.
    """
    assert not dist.is_initialized(), "the parent of a forked world must have no process group of its own"
    with tempfile.TemporaryDirectory(prefix="bloomery-world-") as directory:
        ranks = [_fork(number, world_size, Path(directory), function, args, seconds) for number in range(world_size)]
        try:
            _collect(ranks, time.monotonic() + seconds)
            _raise_failure(ranks, seconds)
        finally:
            for rank in ranks:
                if rank.status is None:
                    with suppress(ProcessLookupError):
                        os.kill(rank.pid, signal.SIGKILL)
                    rank.reap()
    return [rank.answer[1] for rank in ranks if rank.answer]


def _fork(
    number: int, world_size: int, directory: Path, function: Callable[..., Any], args: tuple[Any, ...], seconds: float
) -> _Rank:
    reader, writer = Pipe(duplex=False)
    stacks = directory / f"stacks-{number}"
    stacks.touch()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python warns of any fork beside threads; the docstring above says what makes it safe here.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        writer.close()
        return _Rank(number, pid, reader, stacks)
    status = 1
    gc.freeze()  # what the parent has is not searched for garbage: 0.3 s a full collection, and a copy of its pages
    try:
        die_with_parent(parent)
        reader.close()
        answer = _call(number, world_size, directory, function, args, seconds)
        sys.stdout.flush()
        sys.stderr.flush()
        writer.send_bytes(answer)
        status = 0
        with suppress(Exception):  # keeps the connections open until all have answered; failures were reported
            dist.barrier()
    finally:
        os._exit(status)


def _call(
    number: int, world_size: int, directory: Path, function: Callable[..., Any], args: tuple[Any, ...], seconds: float
) -> bytes:
    """The rank's side: joins the world, calls the function, and pickles (True, result) or (False, exception)."""
    faulthandler.register(signal.SIGUSR1, file=(directory / f"stacks-{number}").open("w"), all_threads=True)
    os.environ.update(
        RANK=str(number),
        LOCAL_RANK=str(number),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        GLOO_SOCKET_IFNAME="lo",
    )
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(directory / "rendezvous"), world_size)
        limit = timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=store, rank=number, world_size=world_size, timeout=limit)
        result = function(*args)
        return pickle.dumps((True, result))
    except BaseException as error:
        error.add_note(f"on rank {number} of {world_size}:\n{traceback.format_exc()}")
        return _pickle_error(error)


def _pickle_error(error: BaseException) -> bytes:
    """The exception itself if it survives pickling, else one that carries its text."""
    try:
        content = pickle.dumps((False, error))
        pickle.loads(content)
        return content
    except Exception:
        return pickle.dumps((False, RuntimeError("\n".join([repr(error), *error.__notes__]))))


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Receives answers until all have come, the time is up, or a failure's grace has passed."""
    open_ranks = list(ranks)
    while open_ranks:
        ready = wait([rank.pipe for rank in open_ranks], max(0.0, deadline - time.monotonic()))
        if not ready:
            return
        for rank in [rank for rank in open_ranks if rank.pipe in ready]:
            rank.receive()
            open_ranks.remove(rank)
            if rank.answer is None or not rank.answer[0]:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)


def _raise_failure(ranks: list[_Rank], seconds: float) -> None:
    died = {rank.number: rank.status for rank in ranks if rank.status is not None}
    if died:
        raise RankDied(died)
    errors = [rank for rank in ranks if rank.answer and not rank.answer[0]]
    if errors:
        first = min(errors, key=lambda rank: rank.arrival)
        assert first.answer
        raise first.answer[1]
    stuck = [rank for rank in ranks if rank.answer is None]
    if stuck:
        names = ", ".join(str(rank.number) for rank in stuck)
        stacks = "\n".join(f"rank {rank.number}:\n{rank.stack()}" for rank in stuck)
        raise WorldTimeout(f"ranks {names} of {len(ranks)} were not done after {seconds} seconds\n{stacks}")
