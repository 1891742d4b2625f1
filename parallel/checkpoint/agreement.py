"""What happens on one rank is known on all: without that, one rank's full disk is another rank's endless wait.

Contract: local work stands inside `agreed(...)`; if it fails on any rank, every rank raises there. No collective
operation may stand inside, because a rank that failed does not come to it. Where a group is named, it is one of all
ranks over the hosts (gloo), so that a thread can agree while training uses the other groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import ProcessGroup

from parallel.common.errors import ConfigError, SystemFailure, UserError


def exchange[Value](value: Value, group: ProcessGroup | None = None) -> list[Value]:
    """Every rank's value, in the order of the ranks."""
    values: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


@contextmanager
def agreed(doing: str, group: ProcessGroup | None = None) -> Iterator[None]:
    """Runs the block on every rank, and fails on all if it fails on one.

    Args:
        doing: what the block does, as in "cannot {doing}: No space left on device".
        group: all ranks; by default torch's own group of them.

    Raises:
        UserError: on all ranks, where a rank met a `UserError` (of the same class) or an error of the operating system
            (`SystemFailure`).
        RuntimeError: on the other ranks, where a rank met anything else; that rank raises the error itself.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = as_user_error(caught, doing)
    reports = exchange(None if error is None else (_kind(error), str(error) or repr(error)), group)
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report:
            kind, text = report
            raise kind(f"rank {rank} cannot {doing}: {text}" if kind is RuntimeError else text)


def _kind(error: Exception) -> type[Exception]:
    """What the other ranks raise, made of one sentence."""
    if isinstance(error, ConfigError):
        return UserError
    return type(error) if isinstance(error, UserError) else RuntimeError


def as_user_error(error: Exception, doing: str) -> Exception:
    """An error of the operating system (full disk, no permission) as one plain sentence; any other as it is."""
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        return SystemFailure(f"cannot {doing}: {error.strerror}{place}")
    return error
