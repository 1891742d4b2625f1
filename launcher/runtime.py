"""What a computing process needs before anything is built: its rank, its device, the process group.

One rank alone meets itself in memory, without a port. Several meet at the address that torchrun or srun put into the
environment, over NCCL where there is an accelerator, else over gloo. Every collective has a time limit, so that a dead
or hung rank is an error and not a silence.
"""

import datetime
import os
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.lifetime import die_with_parent
from launcher.outcome import Outcome
from launcher.watchdog import collectives
from launcher.work import OUTCOME_VARIABLE, STARTER_VARIABLE, Ranks, as_mistake
from parallel.common.errors import UserError
from parallel.common.faults import fault_point

_ROOT = Path(__file__).resolve().parent.parent
_TORCH_HAS_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
COLLECTIVE_LIMIT = datetime.timedelta(minutes=10)
"""Longest wait in a collective; a save of the largest checkpoint has to fit."""


def in_ranks(
    work: Callable[[Ranks], Outcome],
    ranks: Ranks,
    *,
    outcome: Callable[[str], Path | None] = lambda attempt: None,
) -> int:
    """Joins the other ranks, runs `work` with the token that all of them share, and returns the exit code.

    How it ended goes to the starter's file, if a starter waits for it, and to the file that `outcome` names for this
    attempt, if any. An error keeps its stack trace, but for a user's. The first rank that fails says why; the others
    fail because of it.
    """
    told = os.environ.get(OUTCOME_VARIABLE)
    try:
        if STARTER_VARIABLE in os.environ:
            die_with_parent(os.getppid())
        _join(ranks, device_of(ranks))
        token: list[str] = [ranks.attempt]
        dist.broadcast_object_list(token, src=0)
        ranks = replace(ranks, attempt=token[0])
        result = work(ranks)
    except BaseException as error:
        mistake = as_mistake(error)
        code = 2 if mistake else 130 if isinstance(error, KeyboardInterrupt) else 1
        message = str(mistake) if mistake else f"rank {ranks.rank} on {socket.gethostname()}: {_cause(error)}"
        with suppress(OSError):  # a full disk must not hide what filled it
            for file in _files(told, outcome(ranks.attempt)):
                before = Outcome.read(file)
                if before is None or before.attempt != ranks.attempt:
                    Outcome(attempt=ranks.attempt, exit_code=code, message=message).write(file)
        if ranks.world_size > 1:
            _leave(mistake or error, code, speaks=code == 1 or (ranks.rank == 0 and not told))
        raise
    if ranks.rank == 0:
        for file in _files(told, outcome(ranks.attempt)):
            result.write(file)
    dist.barrier()
    dist.destroy_process_group()
    return result.exit_code


def _files(told: str | None, own: Path | None) -> list[Path]:
    return [*([Path(told)] if told else []), *([own] if own else [])]


def _leave(error: BaseException, code: int, *, speaks: bool) -> None:
    """Ends one of several ranks; the interpreter's own end would wait for collectives that nobody will join."""
    if speaks:
        lines = traceback.format_exception(error) if code == 1 else [f"bloomery: {error}\n"]
        sys.stderr.write("".join(lines))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _cause(error: BaseException) -> str:
    lines = traceback.format_exception_only(error)
    cause = lines[-1].strip() if lines else type(error).__name__
    if not isinstance(error, MemoryError) and _TORCH_HAS_NO_MEMORY not in cause:
        return cause
    here = next((frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if _ours(frame)), None)
    place = f" at {Path(here.filename).relative_to(_ROOT)}:{here.lineno} in {here.name}" if here else ""
    return f"the host's memory is exhausted{place} ({cause})"


def _ours(frame: traceback.FrameSummary) -> bool:
    return Path(frame.filename).is_relative_to(_ROOT) and "site-packages" not in frame.filename


def device_of(ranks: Ranks) -> torch.device:
    """Where a rank computes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if ranks.local_rank >= visible:
        raise UserError(
            f"rank {ranks.rank} wants accelerator {ranks.local_rank} of this machine, which has {visible}: "
            f"start at most {visible} ranks on it."
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


def _join(ranks: Ranks, device: torch.device) -> None:
    collectives.record()
    fault_point("rendezvous")
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # DeepSpeed asks for torchrun's name
    backend = "nccl" if device.type == "cuda" else "gloo"
    if ranks.world_size == 1:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_LIMIT, device_id=_bound(device)
        )
        return
    try:
        dist.init_process_group(
            backend,
            init_method="env://",
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=COLLECTIVE_LIMIT,
            device_id=_bound(device),
        )
    except (dist.DistNetworkError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise UserError(
            f"the {ranks.world_size} ranks cannot meet at {address} ({str(error).splitlines()[0]}): "
            "give a free port (MASTER_PORT), or let --ranks N find one."
        ) from error


def _bound(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None
