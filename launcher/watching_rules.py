"""The rules of what is looked at while a run trains. Imports without torch."""

from collections.abc import Iterator

from launcher.config import RunConfig
from launcher.plan.hardware import load
from parallel.common.errors import Problem, UserError


def watching_problems(config: RunConfig) -> Iterator[Problem]:
    """What the run is held against."""
    if config.tracking.hardware is not None:
        try:
            load(config.tracking.hardware)
        except UserError as error:
            legal = f"a name under configs/hardware or a file such as theirs ({str(error).rstrip('.')})"
            yield Problem(key="tracking.hardware", got=config.tracking.hardware, legal=legal)
