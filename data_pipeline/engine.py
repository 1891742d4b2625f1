"""Where the stages' work is done: on this machine's cores, or on those of a Ray cluster.

A stage is a function of one batch, and the results are taken in the order of the batches (data_pipeline.document), so
the bytes that come out do not depend on who computed what. `native` uses threads: most of the work is compiled and
lets go of the interpreter's lock. `ray` sends each batch to a process of the cluster, which reads and writes the
store's directory itself: it has to be seen under the same path by all nodes.

With `ray` a cluster that runs already is joined (`RAY_ADDRESS`); inside a Slurm job of several nodes one is started
over the job's nodes, and ended with the job; else one is started on this machine.

Measured beside it: `benchmarks/dedup.py` runs Daft on the same corpus.
"""

import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import Engine
from data_pipeline.document import Mapper, map_in_order, workers
from data_pipeline.progress import Screen
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

ray = Lazy("ray")

_START_SECONDS, _STOP_SECONDS = 120, 30
_CONNECT_SECONDS = 10
_AHEAD = 2
"""Batches for each core that are under way at once."""


@contextmanager
def open_engine(engine: Engine) -> Iterator[Mapper]:
    """What does the work of the stages, as long as the block lasts.

    Raises:
        UserError: `ray` is not installed, or no cluster can be had.
    """
    if engine is Engine.native:
        yield map_in_order
        return
    if not ray.is_installed:
        raise UserError("data.engine=ray needs Ray: install it with `pip install bloomery[ray]`, or set it to native")
    with ExitStack() as stack:
        address, nodes = os.environ.get("RAY_ADDRESS"), 1
        if address is not None:
            _require_reachable(address)
        elif (slurm_nodes := int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))) > 1:
            address, nodes = stack.enter_context(_slurm_cluster(slurm_nodes)), slurm_nodes
        try:
            own: dict[str, Any] = {"include_dashboard": False, "num_cpus": workers()} if address is None else {}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"the Ray cluster at {address or 'this machine'} cannot be joined: {error}") from error
        stack.callback(ray.shutdown)
        if not _becomes_true(lambda: _alive() >= nodes, seconds=_START_SECONDS):
            raise UserError(
                f"Ray has {_alive()} of the job's {nodes} nodes after {_START_SECONDS} s: start the job again"
            )
        cores = int(ray.cluster_resources().get("CPU", 1))
        Screen().line("ray", f"{_alive()} nodes with {cores} cores")
        yield _RayMapper(cores)


def _require_reachable(address: str) -> None:
    """Ray itself would try for minutes, and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # `auto`, `local`
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise UserError(f"the Ray cluster at {address} cannot be joined: {error.strerror or error}") from error


class _RayMapper:
    """`map` over the processes of a cluster, results in order."""

    def __init__(self, cores: int) -> None:
        self._ahead = max(2, cores * _AHEAD)

    def __call__[Item, Result](self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        task: Any = ray.remote(num_cpus=1, max_retries=2, scheduling_strategy="SPREAD")(_call)
        shared = ray.put(function)
        pending: deque[Any] = deque()
        try:
            for item in items:
                pending.append(task.remote(shared, item))
                if len(pending) >= self._ahead:
                    yield _result(pending.popleft())
            while pending:
                yield _result(pending.popleft())
        finally:
            for left in pending:
                ray.cancel(left, force=True)


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def _result(reference: Any) -> Any:
    """What a task returned; what it said about the user's data is said as if it had happened here."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise


@contextmanager
def _slurm_cluster(nodes: int) -> Iterator[str]:
    """The address of a cluster over the nodes of this Slurm job, with its head here.

    Nothing but what was started here ends with the block: `ray stop` would end all Ray of a node, another job's too.
    Who wants to join has to know a token of this call, for whoever joins may run any code.
    """
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    here, port = os.environ.get("SLURMD_NODENAME") or os.uname().nodename, _free_port()
    address, cores = f"{here}:{port}", os.environ.get("SLURM_CPUS_ON_NODE", "1")
    by_srun = ["srun", "--overlap", f"--nodes={nodes - 1}", f"--ntasks={nodes - 1}", f"--exclude={here}"]
    with tempfile.TemporaryDirectory(prefix="bloomery-ray-", ignore_cleanup_errors=True) as files:
        program = str(Path(sys.executable).with_name("ray"))
        ray_start = [program, "start", "--block", f"--num-cpus={cores}", f"--temp-dir={files}"]
        head = [*ray_start, "--head", f"--port={port}", "--include-dashboard=false", "--disable-usage-stats"]
        with _running(head) as first:
            _becomes_true(lambda: first.poll() is not None or _answers(address), seconds=_START_SECONDS)
            if not _answers(address):
                raise UserError(f"Ray cannot be started on {here}: its own words stand above")
            with _running([*by_srun, *ray_start, f"--address={address}"]):
                yield address
        subprocess.run([*by_srun, "rm", "-rf", "--", files], timeout=_START_SECONDS, check=False)


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process of Ray that ends, with all that it has started, at the end of the block."""
    at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # no requests are served here that could be drained
    process = subprocess.Popen(
        command, env={**os.environ, **at_once}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def _becomes_true(condition: Callable[[], bool], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
