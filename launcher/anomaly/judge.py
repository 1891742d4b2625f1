"""Judges every step before its update: NaN, infinity, a spike of the loss, an outlier of the gradient norm.

Contract: all ranks decide alike, because they first take the maximum of what each has found; an update that is refused
changes neither weights nor moments, and nothing is saved before it is judged. What ends the run or takes it back is
raised on all ranks at the same step, where no collective operation is left half done.

Mechanism: the host never waits for the step that it has just asked for. What is usual is a limit for the loss and one
for the norm, numbers that the host knows; the comparison is made on the device, and its answer goes into the
optimizer's kernel (`Updater.step`). Loss and norm travel to the host meanwhile (`Arrival`) and are read before the next
update is asked for, when the device has the next step's passes to do: then the windows, the events, the counts and the
policies follow. So the limits of a step know all steps before it, as if each had been read at once, and a run that is
stopped or taken back is so one step later, by the numbers of the step that was bad. Where a step is logged or saved,
all of that happens at its end.

"Far above" is measured by median and median absolute deviation, which a few outliers in the window do not move; the
deviation counts as at least 1 % of the median, so that a flat loss is not all spikes. Norms are measured by their
logarithms, because they scatter by factors: measured as they are, five of the quickstart's 500 were spikes.
What was judged ordinary stands in the checkpoint, so that a resumed run judges as one that never stopped.
"""

import logging
import math
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.anomaly.config import AnomalyConfig, Policy
from launcher.watchdog.pulse import Steps
from parallel.arrival import Arrival
from parallel.common.stateful import Dispensable

logger = logging.getLogger(__name__)

_DEVIATION_OF_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_DEVIATION = 0.01


class RollBack(Exception):
    """The run goes back to its newest checkpoint; raised on all ranks."""

    def __init__(self, cause: str, *, step: int, position: int) -> None:
        """`step` was bad, and `position` is where the loader stood behind its batch."""
        super().__init__(cause)
        self.step = step
        self.position = position


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """A step that is asked for and not read yet."""

    step: int
    position: int
    limits: dict[str, float]
    """Above them the loss and the norm are spikes."""
    numbers: Arrival
    """Whether the loss is not finite, and the norm; loss and norm; over all ranks."""


class Judge(Dispensable):
    """The engine asks it before each update; the ranks' agreement after the step asks it whether the run goes on."""

    def __init__(
        self,
        config: AnomalyConfig,
        *,
        progress: Steps,
        position: Callable[[], int],
        several: bool,
        due: Callable[[int], bool],
        refused: Callable[[], None],
        event: Callable[..., None],
    ) -> None:
        """Takes no part in anything yet.

        Args:
            config: the policies.
            progress: says which step is being taken.
            position: says where the loader stands, behind that step's batch.
            several: whether there are other ranks.
            due: whether a step's numbers are read at its end, as everybody waits for them.
            refused: told of an update that was not made.
            event: writes an event of the run.
        """
        self._config = config
        self._progress = progress
        self._position = position
        self._several = several
        self._due = due
        self._refused = refused
        self._event = event
        self._losses: deque[float] = deque(maxlen=config.window_steps)
        self._norms: deque[float] = deque(maxlen=config.window_steps)
        self._skipped_in_a_row = 0
        self._asked: _Step | None = None
        self._pending: Exception | None = None
        self._rollbacks: list[int] = []

    def refuses(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the update must not be made, [] float32 on the device: 1 or 0; all ranks call this.

        Args:
            loss: the step's loss, [].
            norm: its gradient norm, [].
        """
        self._read()
        numbers = torch.stack([loss.double(), norm.to(loss.device, torch.float64)])
        wrong = ~numbers.isfinite()
        both = torch.cat([wrong.double(), numbers.where(~wrong, -math.inf)])  # [4]
        if self._several:
            dist.all_reduce(both, op=dist.ReduceOp.MAX)
        refused = both[:2].amax() > 0
        limits = self._limits()
        for number, (kind, limit) in zip(both[2:], limits.items(), strict=True):
            if self._policy(kind) is not Policy.tell:
                refused = refused | (number > limit)
        step, position = self._progress.step + 1, self._position()
        self._asked = _Step(step=step, position=position, limits=limits, numbers=Arrival(both))
        return refused.float()

    def settle(self) -> None:
        """Reads the last step, waiting for the device; nothing is saved before. All ranks call this, and decide alike.

        Raises:
            FloatingPointError: the run ends.
            RollBack: it goes back.
        """
        self._read()
        self.answer(self.ask())

    def _read(self) -> None:
        """Judges the step that was asked for last as the device has judged it, and does what follows."""
        if self._asked is None:
            return
        asked, self._asked = self._asked, None
        *wrong, loss, norm = asked.numbers.read()
        kind, cause = self._found(asked, wrong, {"loss_spike": loss, "gradient_spike": norm})
        policy = self._policy(kind) if kind else Policy.tell
        if policy is Policy.tell:
            self._losses.append(loss)
            self._norms.append(norm)
            self._skipped_in_a_row = 0
        else:
            self._refused()
        if kind:
            self._act(asked, kind, policy, cause)

    def ask(self) -> bool:
        """Whether the run may not simply go on, for the step before or for one that is due."""
        if self._due(self._progress.step + 1):
            self._read()
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
        """JSON; of a judge that has settled."""
        assert self._asked is None
        return {"losses": list(self._losses), "norms": list(self._norms), "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on judging as before; what it was about to judge is of a time that is gone."""
        self._asked = None
        for mine, saved in ((self._losses, state["losses"]), (self._norms, state["norms"])):
            mine.clear()
            mine.extend(saved)
        self._skipped_in_a_row = state["skipped_in_a_row"]

    def _policy(self, kind: str) -> Policy:
        return getattr(self._config, kind)

    def _limits(self) -> dict[str, float]:
        """Of the loss and of the norm; above it a value is a spike."""
        loss, norm = math.inf, math.inf
        if len(self._losses) >= self._config.window_steps:
            loss = _limit(self._losses, self._config.deviations)
            norm = math.exp(_limit(map(_logarithm, self._norms), self._config.deviations, unit=1.0))
        return {"loss_spike": loss, "gradient_spike": norm}

    def _found(self, asked: _Step, wrong: list[float], values: dict[str, float]) -> tuple[str, str]:
        """What is out of the ordinary and in which words, two empty ones if nothing is; a refusal before a remark."""
        names, step, limits = ("loss", "gradient norm"), asked.step, asked.limits
        if any(wrong):
            which = " and ".join(name for name, is_wrong in zip(names, wrong, strict=True) if is_wrong)
            return "not_finite", f"the {which} of step {step} {'are' if all(wrong) else 'is'} not finite"
        spikes = [kind for kind, value in values.items() if value > limits[kind]]
        for kind in sorted(spikes, key=lambda kind: self._policy(kind) is Policy.tell):
            name, window = ("loss", self._losses) if kind == "loss_spike" else ("gradient norm", self._norms)
            usual = f"usual is {statistics.median(window):.4g}, up to {limits[kind]:.4g}"
            return kind, f"the {name} of step {step} is {values[kind]:.4g}, {usual}"
        return "", ""

    def _act(self, asked: _Step, kind: str, policy: Policy, cause: str) -> None:
        ends = "the run ends here, unsaved; go on from the newest checkpoint with a lower optimizer.learning_rate"
        if policy is Policy.skip:
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > self._config.tries:
                policy, ends = Policy.stop, f"it is the {self._skipped_in_a_row}. in a row (anomaly.tries): {ends}"
        self._event("anomaly", step=asked.step, kind=kind, policy=policy.value, cause=cause)
        if policy is Policy.stop:
            self._pending = FloatingPointError(f"{cause}: {ends}, or with other data (anomaly.{kind}=skip or rollback)")
        elif policy is Policy.rollback:
            self._pending = RollBack(cause, step=asked.step, position=asked.position)
        else:
            does = "the step is taken" if policy is Policy.tell else "its update is not made"
            # Not a warning, which each rank would show: all have decided alike, and rank 0 says so.
            logger.info("%s: %s (anomaly.%s=%s)", cause, does, kind, policy.value)


def _limit(window: Iterable[float], deviations: float, *, unit: float | None = None) -> float:
    """Above it a value is a spike; `unit` is by default the median."""
    values = list(window)
    median = statistics.median(values)
    deviation = _DEVIATION_OF_NORMAL * statistics.median(abs(value - median) for value in values)
    return median + deviations * max(deviation, _LEAST_DEVIATION * (abs(median) if unit is None else unit))


def _logarithm(norm: float) -> float:
    return math.log(max(norm, sys.float_info.min))
