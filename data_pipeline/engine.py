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
import shutil
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.config import Engine
from data_pipeline.document import Mapper, map_in_order, workers
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

ray = Lazy("ray")
logger = logging.getLogger(__name__)

_PORT = 6399
_START_SECONDS = 120
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
        address = os.environ.get("RAY_ADDRESS") or stack.enter_context(_slurm_cluster())
        if address is not None:
            _require_reachable(address)
        try:
            own: dict[str, Any] = {"include_dashboard": False, "num_cpus": workers()} if address is None else {}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"the Ray cluster at {address or 'this machine'} cannot be joined: {error}") from error
        stack.callback(ray.shutdown)
        cores = int(ray.cluster_resources().get("CPU", 1))
        logger.info("Ray has %d nodes and %d cores", len(ray.nodes()), cores)
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
def _slurm_cluster() -> Iterator[str | None]:
    """A cluster over the nodes of this Slurm job, with its head here; None outside of a job of several nodes."""
    nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if nodes < 2 or shutil.which("srun") is None:
        yield None
        return
    program = str(Path(sys.executable).with_name("ray"))
    here = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    address = f"{here}:{_PORT}"
    cores = os.environ.get("SLURM_CPUS_ON_NODE", "1")
    head = [program, "start", "--head", f"--port={_PORT}", f"--num-cpus={cores}", "--include-dashboard=false"]
    done = subprocess.run(head, capture_output=True, text=True, timeout=_START_SECONDS, check=False)
    if done.returncode:
        raise UserError(f"Ray cannot be started on {here}: {done.stderr.strip().splitlines()[-1:]}")
    command = ["srun", "--overlap", f"--nodes={nodes - 1}", f"--ntasks={nodes - 1}", f"--exclude={here}"]
    others = subprocess.Popen([*command, program, "start", f"--address={address}", f"--num-cpus={cores}", "--block"])
    try:
        yield address
    finally:
        others.terminate()
        try:
            others.wait(timeout=_START_SECONDS)
        except subprocess.TimeoutExpired:
            others.kill()
        subprocess.run([program, "stop"], capture_output=True, timeout=_START_SECONDS, check=False)
