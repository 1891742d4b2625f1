"""How many samples each step takes: the same number throughout, or a ramp of phases before it.

Steps and positions in the global order of samples are two names of one place, so a ramp moves the borders of steps and
never the order: whatever the sizes, the n-th sample is the n-th sample. Everything here follows from a position, which
is what a checkpoint keeps. Imports without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Steps of one size."""

    step: int
    """First step, counted from 0."""
    position: int
    """Samples before it."""
    size: int
    """Samples in each step."""


class BatchSizes:
    """Sizes of the global batches of a run, without end."""

    def __init__(self, size: int, ramp: Sequence[tuple[int, int]] = ()) -> None:
        """`ramp` are pairs of a size and how many steps have it, in order; then every step has `size`."""
        phases = [Phase(step=0, position=0, size=size)]
        for each, steps in ramp:
            last = phases[-1]
            phases[-1] = Phase(step=last.step, position=last.position, size=each)
            phases.append(Phase(step=last.step + steps, position=last.position + steps * each, size=size))
        self.phases = tuple(phases)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that occurs, in order."""
        return tuple(phase.size for phase in self.phases)

    def at(self, position: int) -> int:
        """Samples of the step that begins at a position."""
        return self._phase(position).size

    def alike(self, position: int) -> int | None:
        """How many steps from a position on have the same size; None: all."""
        later = [phase.position for phase in self.phases if phase.position > position]
        return -(-(later[0] - position) // self.at(position)) if later else None

    def position(self, steps: int) -> int:
        """Samples before the step of this number, counted from 0."""
        phase = next(phase for phase in reversed(self.phases) if phase.step <= steps)
        return phase.position + (steps - phase.step) * phase.size

    def steps(self, samples: int) -> int:
        """Whole steps that take at least so many samples."""
        phase = self._phase(samples)
        return phase.step - (phase.position - samples) // phase.size

    def _phase(self, position: int) -> Phase:
        return next(phase for phase in reversed(self.phases) if phase.position <= position)


def rows_per_rank(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Rows that each data-parallel rank gets: its share, rounded up to whole micro-batches."""
    return -(-global_batch_size // (dp_size * micro_batch_size)) * micro_batch_size
