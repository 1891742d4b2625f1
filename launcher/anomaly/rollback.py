"""Back to the newest checkpoint, past the data that led astray.

The weights, moments and schedule of the checkpoint come back; the loader then jumps to where it was, so that the next
step takes the batch behind the one that was judged. What was jumped over stands in the loader's state, and its ledger
does not count it. A run that dies before its next checkpoint meets the same step again, and does the same.
"""

import logging

from launcher.anomaly.judge import RollBack
from launcher.assemble import Parts
from launcher.run_directory import Records

logger = logging.getLogger(__name__)


def roll_back(parts: Parts, records: Records, asked: RollBack) -> None:
    """Every rank calls this, between two steps.

    Raises:
        FloatingPointError: there is no checkpoint, or the run went back to the same one too often.
    """
    parts.checkpoints.wait()
    if parts.checkpoints.resume(parts.participants, fallback=False) is None:
        raise FloatingPointError(f"{asked}: the run ends here, for it has no checkpoint yet to go back to")
    parts.judge.rolled_back(parts.progress.step)
    jumped = asked.position - parts.loader.position
    parts.loader.jump(asked.position)
    records.went_back(step=parts.progress.step, from_step=asked.step, jumped_samples=jumped, cause=str(asked))
    logger.warning(
        "%s: back to the checkpoint of step %d, and on behind %d samples that are jumped over",
        asked, parts.progress.step, jumped,
    )  # fmt: skip
