"""Every so many steps: do the ranks that hold the same weights still hold the same weights? If not, the run stops."""

import logging
from collections.abc import Callable, Sequence

from torch.distributed import ProcessGroup

from launcher.anomaly.config import AnomalyConfig
from launcher.watchdog.pulse import Steps
from parallel.engine import Engine
from parallel.replicas import compare

logger = logging.getLogger(__name__)


class SilentCorruption(RuntimeError):
    """Copies of one weight differ; raised on all ranks."""


class Replicas:
    """Rides with what the ranks agree on after each step, before anything is saved."""

    def __init__(
        self,
        config: AnomalyConfig,
        *,
        engine: Engine,
        progress: Steps,
        group: ProcessGroup,
        hosts: Sequence[str],
        event: Callable[..., None],
    ) -> None:
        self._every = config.replicas_every_steps
        self._engine = engine
        self._progress = progress
        self._group = group
        self._hosts = hosts
        self._event = event
        self._said = ""

    def ask(self) -> bool:
        """Whether copies differ, where it is time to look."""
        step = self._progress.step + 1
        if self._every is None or step % self._every:
            return False
        odd = compare(self._engine.parameters, self._engine.frozen, self._engine.updater, self._group)
        if odd is not None:
            names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in odd.ranks)
            whose = f"{names} holds other bits than the ranks that should hold the same"
            if not odd.certain:
                whose = f"{names} should hold the same bits and do not; which of them is wrong nobody can say"
            self._said = f"silent corruption at step {step}, in {odd.parameter}: {whose}"
            self._event("corrupted", step=step, parameter=odd.parameter, ranks=list(odd.ranks), certain=odd.certain)
        return odd is not None

    def answer(self, anywhere: bool) -> None:
        """Stops the run.

        Raises:
            SilentCorruption: names the parameter and the rank.
        """
        if anywhere:
            raise SilentCorruption(
                f"{self._said}; the run ends here, unsaved: test that machine's memory and accelerator, leave it out, "
                "and go on from the newest checkpoint"
            )
