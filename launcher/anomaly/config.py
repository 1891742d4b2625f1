"""What a run does when its numbers go wrong. Imports without torch."""

from dataclasses import dataclass
from enum import StrEnum


class Policy(StrEnum):
    """What becomes of a step that is out of the ordinary; every policy is also told and written to `events.jsonl`."""

    tell = "tell"
    """It is taken; only for steps whose numbers are finite."""
    skip = "skip"
    """Its update is not made: weights and moments stay as they were, the next batch comes."""
    rollback = "rollback"
    """The newest checkpoint is loaded, and the batches from there to this one are jumped over."""
    stop = "stop"
    """The run ends, unsaved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnomalyConfig:
    """A step is judged before its update, by all ranks together."""

    not_finite: Policy = Policy.stop
    """The loss or the gradient norm is NaN or infinite."""
    loss_spike: Policy = Policy.tell
    """The loss is far above those of the last steps."""
    gradient_spike: Policy = Policy.tell
    """The gradient norm before clipping is far above those of the last steps."""
    window_steps: int = 128
    """The last steps that say what is ordinary; nothing is a spike before there are so many."""
    deviations: float = 8.0
    """A spike is so many standard deviations above the median, the deviation being that of the middle half; of gradient
    norms, in logarithms."""
    tries: int = 3
    """Steps skipped in a row, or rollbacks to the same checkpoint; the next one stops the run."""
    replicas_every_steps: int | None = 1000
    """Steps between two comparisons of what several ranks hold alike; one that differs stops the run. null: never."""
