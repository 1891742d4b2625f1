"""What a user's terminal shows: what Bloomery says, from rank 0, and anybody's errors.

Everything else that libraries say, while they are imported and later, goes to `logs/rank-NNNNN.log` in the run: quiet,
not lost. This filter is set here, once, before the first library is imported, and nowhere else. Imports without torch.
"""

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOMS = ("data_pipeline", "launcher", "model", "parallel")

logger = logging.getLogger(__name__)


@contextmanager
def quiet_imports(rank: int, directory: Path) -> Iterator[None]:
    """Sets the log up; what libraries print while they are imported in the block goes to the file of this rank."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"rank-{rank:05d}.log"
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for a compiler's worth of others first
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # megatron-core would import 0.8 s of compiler for nothing
    _to(path, rank)
    with path.open("ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
        try:
            for descriptor, _ in kept:
                os.dup2(file.fileno(), descriptor)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in kept:
                os.dup2(copy, descriptor)
                os.close(copy)
            _take_over_libraries()


class _Terminal(logging.Handler):
    """Prints through whatever stdout and stderr are now: a progress bar replaces both while it stands."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr if record.levelno >= logging.ERROR else sys.stdout, flush=True)


def _to(path: Path, rank: int) -> None:
    """Everything to the file; ours (rank 0) and everybody's errors to the terminal."""
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = _Terminal()
    terminal.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    terminal.addFilter(lambda record: _for_people(record, rank))
    root = logging.getLogger()
    root.handlers[:] = [file, terminal]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    threading.excepthook = _thread_failed


def _take_over_libraries() -> None:
    """Libraries that gave themselves handlers to the terminal speak through ours, and as seldom: torch's checkpoints
    would tell of each tensor twice a save."""
    for name, library in list(logging.Logger.manager.loggerDict.items()):
        if isinstance(library, logging.Logger) and name.split(".")[0] not in ROOMS and library.handlers:
            library.handlers.clear()
            library.propagate = True
            library.setLevel(max(library.level, logging.INFO))


def _for_people(record: logging.LogRecord, rank: int) -> bool:
    if record.levelno >= logging.ERROR:
        return True
    ours = record.name.split(".")[0] in ROOMS
    return ours and record.levelno >= (logging.INFO if rank == 0 else logging.WARNING)


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    error = (failure.exc_type, failure.exc_value or failure.exc_type(), failure.exc_traceback)
    logger.error("a thread (%s) failed", failure.thread.name if failure.thread else "?", exc_info=error)
