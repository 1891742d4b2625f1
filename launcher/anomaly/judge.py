"""Judges every step before its update: NaN, infinity, a spike of the loss, an outlier of the gradient norm.

Contract: all ranks decide alike, because they first take the maximum of what each has read; an update that is refused
changes neither weights nor moments. What ends the run or takes it back is raised where the ranks agree after the step,
on all of them at the same step, so that no collective operation is left half done.

Trade-off: reading two numbers waits for the device once a step, and agreeing costs some 100 us; what is gained is that
no bad step ever reaches the weights. "Far above" is measured by median and median absolute deviation, which a few
outliers in the window do not move; the deviation counts as at least 1 % of the median, so that a flat loss is not all
spikes. What was judged ordinary stands in the checkpoint, so that a resumed run judges as one that never stopped.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from launcher.anomaly.config import AnomalyConfig, Policy
from launcher.watchdog.pulse import Steps
from parallel.common.stateful import Dispensable

logger = logging.getLogger(__name__)

_DEVIATION_OF_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_DEVIATION = 0.01


class RollBack(Exception):
    """The run goes back to its newest checkpoint; raised on all ranks."""


class Judge(Dispensable):
    """The engine asks it before each update; the ranks' agreement after the step asks it whether the run goes on."""

    def __init__(
        self,
        config: AnomalyConfig,
        *,
        progress: Steps,
        group: ProcessGroup | None,
        event: Callable[..., None],
    ) -> None:
        """Takes no part in anything yet.

        Args:
            config: the policies.
            progress: says which step is being taken.
            group: all ranks over the hosts, nobody else's; None for a rank alone.
            event: writes an event of the run.
        """
        self._config = config
        self._progress = progress
        self._group = group
        self._event = event
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._norms: deque[float] = deque(maxlen=config.window_steps)
        self._skipped_in_a_row = 0
        self._pending: Exception | None = None
        self._rollbacks: list[int] = []

    def accepts(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether the update may be made, from the step's loss [] and gradient norm []; all ranks call this."""
        numbers = torch.tensor([loss.item(), norm.item()], dtype=torch.float64)
        bad = ~numbers.isfinite()
        both = torch.cat([bad.double(), numbers.where(~bad, -math.inf)])  # [4]
        if self._group is not None:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self._group)
        *wrong, loss_value, norm_value = both.tolist()
        step = self._progress.step + 1
        if any(wrong):
            kind, policy = "not_finite", self._config.not_finite
            names = " and ".join(
                name for name, is_wrong in zip(("loss", "gradient norm"), wrong, strict=True) if is_wrong
            )
            cause = f"the {names} of step {step} {'are' if all(wrong) else 'is'} not finite"
        elif found := self._spike(step, loss_value, norm_value):
            kind, cause = found
            policy = getattr(self._config, kind)
        else:
            kind, policy, cause = "", Policy.tell, ""
        accepted = policy is Policy.tell
        if accepted:
            self._losses.append(loss_value)
            self._norms.append(norm_value)
            self._skipped_in_a_row = 0
        if kind:
            self._act(step, kind, policy, cause)
        return accepted

    def ask(self) -> bool:
        """Whether the run may not simply go on."""
        return self._pending is not None

    def answer(self, anywhere: bool) -> None:
        """Ends the run or takes it back, on all ranks.

        Raises:
            FloatingPointError: it ends.
            RollBack: it goes back.
        """
        if anywhere:
            pending, self._pending = self._pending, None
            raise pending or RuntimeError("another rank judged this step otherwise")

    def rolled_back(self, step: int) -> None:
        """The run went back to the checkpoint of a step.

        Raises:
            FloatingPointError: it has done so too often.
        """
        self._rollbacks = [before for before in self._rollbacks if before == step] + [step]
        if len(self._rollbacks) > self._config.tries:
            raise FloatingPointError(
                f"the run went back to the checkpoint of step {step} for the {len(self._rollbacks)}. time "
                f"(anomaly.tries is {self._config.tries}) and ends here: the data are not to blame; "
                "go on with a lower optimizer.learning_rate, or from an older checkpoint"
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"losses": list(self._losses), "norms": list(self._norms), "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on judging as before."""
        for mine, saved in ((self._losses, state["losses"]), (self._norms, state["norms"])):
            mine.clear()
            mine.extend(saved)
        self._skipped_in_a_row = state["skipped_in_a_row"]

    def _spike(self, step: int, loss: float, norm: float) -> tuple[str, str] | None:
        if len(self._losses) < self._config.window_steps:
            return None
        for kind, name, value, window in (
            ("loss_spike", "loss", loss, self._losses),
            ("gradient_spike", "gradient norm", norm, self._norms),
        ):
            limit = _limit(window, self._config.deviations)
            if value > limit:
                usual = statistics.median(window)
                return kind, f"the {name} of step {step} is {value:.4g}, usual is {usual:.4g}, up to {limit:.4g}"
        return None

    def _act(self, step: int, kind: str, policy: Policy, cause: str) -> None:
        ends = "the run ends here, unsaved; go on from the newest checkpoint with a lower optimizer.learning_rate"
        if policy is Policy.skip:
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > self._config.tries:
                policy, ends = Policy.stop, f"it is the {self._skipped_in_a_row}. in a row (anomaly.tries): {ends}"
        self._event("anomaly", step=step, kind=kind, policy=policy.value, cause=cause)
        if policy is Policy.stop:
            self._pending = FloatingPointError(f"{cause}: {ends}, or with other data (anomaly.{kind}=skip or rollback)")
        elif policy is Policy.rollback:
            self._pending = RollBack(cause)
        else:
            does = "the step is taken" if policy is Policy.tell else "its update is not made"
            # Not a warning, which each rank would show: all have decided alike, and rank 0 says so.
            logger.info("%s: %s (anomaly.%s=%s)", cause, does, kind, policy.value)


def _limit(window: Iterable[float], deviations: float) -> float:
    """Above it a value is a spike."""
    values = list(window)
    median = statistics.median(values)
    deviation = _DEVIATION_OF_NORMAL * statistics.median(abs(value - median) for value in values)
    return median + deviations * max(deviation, _LEAST_DEVIATION * abs(median))
