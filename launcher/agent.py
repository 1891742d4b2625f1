"""torchrun itself, with a quiet end: started by `--ranks N`, never by hand.

Where a worker fails, its own stack trace has been printed and `outcome.json` holds the cause; torchrun's summary of
exit codes after it would only bury both. This process dies with its starter, so that no rank outlives a killed
`bloomery train`.
"""

import logging
import os
import sys

from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from launcher.lifetime import die_with_parent
from launcher.work import STARTER_VARIABLE

if __name__ == "__main__":
    die_with_parent(int(os.environ[STARTER_VARIABLE]))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(sys.argv[1:])
    except (ChildFailedError, SignalException):
        sys.exit(1)
    except DistNetworkError as error:
        print(f"bloomery: no free port for the ranks to meet on this machine ({error}).", file=sys.stderr)
        sys.exit(2)
