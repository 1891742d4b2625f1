"""torchrun itself, with a quiet end: started by `--ranks N` and by slurm/train.sbatch, never by hand.

Where a worker fails, its own stack trace has been printed and `outcome.json` holds the cause; torchrun's summary of
exit codes after it would only bury both. A worker that a signal killed cannot speak: its node is noted down for it.

A TERM reaches the workers too, who save and stop. torchrun would kill them 30 s later, whatever they are writing; here
whoever sent the signal (a scheduler, with its own grace time) decides when it was long enough. Started by `--ranks N`,
this process dies with its starter, so that no rank outlives a killed `bloomery train`.
"""

import logging
import os
import signal
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from launcher.blame import Kind, blame, node_name
from launcher.lifetime import children, die_with_parent, send
from launcher.work import ATTEMPT_VARIABLE, STARTER_VARIABLE

_KILLED_BY_TORCHRUN = (-signal.SIGTERM,)


def _hand_on(number: int, _frame: object) -> None:
    workers = children(os.getpid())
    for worker in workers:
        send(worker, number)
    if not workers:
        os._exit(128 + number)


def _note(failed: ChildFailedError) -> None:
    """The node whose rank was killed, for the scheduler's next choice of nodes."""
    host = node_name()
    killed = {rank: failure for rank, failure in failed.failures.items() if failure.exitcode < 0}
    for rank, failure in killed.items():
        if failure.exitcode in _KILLED_BY_TORCHRUN:
            continue
        cause = f"rank {rank} on {host} was killed by {signal.Signals(-failure.exitcode).name}"
        print(f"bloomery: {cause}", file=sys.stderr, flush=True)
        blame(host, cause, attempt=os.environ.get(ATTEMPT_VARIABLE), kind=Kind.killed)


if __name__ == "__main__":
    if STARTER_VARIABLE in os.environ:
        die_with_parent(int(os.environ[STARTER_VARIABLE]))
    signal.signal(signal.SIGTERM, _hand_on)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as failed:
        _note(failed)
        sys.exit(1)
    except SignalException:
        sys.exit(1)
    except DistNetworkError as error:
        print(f"bloomery: no free port for the ranks to meet on this machine ({error}).", file=sys.stderr)
        sys.exit(2)
