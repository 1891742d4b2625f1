"""The learning rate as a function of the step.

Contract: `learning_rate(step)` is for the step-th update, counted from 1. Warm-up is linear from zero and reaches the
peak at `warmup_steps`; the shape after it ends at `min_learning_rate` on the last step. An inverse square root knows no
last step: it is the peak times sqrt(warmup_steps / step), no lower than `min_learning_rate`.
"""

import math
from typing import Any

from parallel.config import OptimizerConfig, ScheduleName


class Schedule:
    """Learning rates of a run of `total_steps`; keeps the count of steps taken, which a checkpoint keeps too."""

    def __init__(self, config: OptimizerConfig, total_steps: int) -> None:
        self.config = config
        self.total_steps = total_steps
        self.steps_taken = 0

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step-th update (1 to `total_steps`)."""
        shape, peak = self.config.schedule, self.config.learning_rate
        if step <= shape.warmup_steps:
            return peak * step / shape.warmup_steps
        lowest = shape.min_learning_rate
        remaining = self._remaining_share(step)
        if shape.name is ScheduleName.constant:
            return peak
        if shape.name is ScheduleName.inverse_sqrt:
            return max(lowest, peak * math.sqrt(max(1, shape.warmup_steps) / step))
        if shape.name is ScheduleName.cosine:
            return lowest + (peak - lowest) * 0.5 * (1 - math.cos(math.pi * remaining))
        return lowest + (peak - lowest) * remaining

    def _remaining_share(self, step: int) -> float:
        """How much of the decay is still ahead: 1 before it starts, 0 at the last step."""
        shape = self.config.schedule
        decay_steps = self.total_steps - shape.warmup_steps
        if shape.name is ScheduleName.wsd:
            decay_steps = shape.decay_steps or max(1, self.total_steps // 10)
        return min(1.0, max(0.0, (self.total_steps - step) / max(1, decay_steps)))

    def state_dict(self) -> dict[str, Any]:
        """Steps taken."""
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the steps that were taken."""
        self.steps_taken = state["steps_taken"]
