"""Whether the time between Slurm's signal and its time limit is enough for a save, by what saves have taken so far.

From the signal on, the ranks finish a step, write a checkpoint and leave; a checkpoint that is not whole by the limit
is lost with the steps since the one before. So the lead time has to be twice the longest save at least. Known from the
first save on: it is said then, and at the start of every later job.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

from parallel.common.units import format_duration

LEAD_VARIABLE = "BLOOMERY_LEAD_SECONDS"
"""How long before the limit this job is asked to stop; slurm/train.sbatch sets it."""
_TIMES = 2


def lead_time_too_short(events: Iterable[Mapping[str, Any]]) -> str | None:
    """A sentence for the user, where the saves among a run's events say so; None else, and outside of such a job."""
    lead_seconds = os.environ.get(LEAD_VARIABLE)
    longest = max((event["seconds"] for event in events if event["event"] == "saved" and "seconds" in event), default=0)
    if lead_seconds is None or longest * _TIMES <= float(lead_seconds):
        return None
    wanted = int(longest * _TIMES) + 1
    return (
        f"slurm.lead_seconds is {lead_seconds}, and saving has taken {format_duration(longest)}: a stop at the time "
        f"limit would lose the steps since the checkpoint before; give it {wanted} at least"
    )
