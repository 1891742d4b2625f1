"""What training reads when: mixtures and sequence lengths that change at stated steps.

A schedule is a list of phases, each from a position of the global order on; the last one never ends. Inside a phase a
mixture says which source stands where; how many samples of a source went before follows from the phases before by a
formula. So a phase that is added behind the position of a run changes nothing that was decided, a source goes on where
the phase before left it, and one that appears for the first time begins at its first sample: nothing is lost and
nothing repeated, however often weights change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batch_sizes import BatchSizes
from data_pipeline.config import PhaseConfig
from data_pipeline.mixture import Mixture, random_bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Positions with one mixture and one length."""

    start: int
    """First position, samples."""
    origin: int
    """Where its mixture began: that of the phase before goes on undisturbed where only the length changes."""
    mixture: Mixture
    segment_length: int | None
    """Tokens after which attention and positions begin anew inside a sequence; None: only at documents."""
    in_sources: NDArray[np.int64]
    """Index in `Schedule.sources` of each source of the mixture."""


class Schedule:
    """position -> (source, n-th sample of that source)."""

    def __init__(
        self,
        weights: Mapping[str, float],
        phases: Sequence[PhaseConfig],
        *,
        seed: int,
        batch_sizes: BatchSizes,
        sequence_length: int,
    ) -> None:
        """`weights` hold from position 0 on; what a phase leaves out stays as in the one before.

        Raises:
            ConfigError: weights that make no sense.
        """
        planned: list[tuple[int, int, Mixture, int | None]] = [(0, 0, Mixture(weights, seed=seed), None)]
        for phase in sorted(phases, key=lambda phase: phase.from_step):
            start = batch_sizes.position(phase.from_step)
            _, origin, mixture, length = planned[-1]
            if phase.mixture:
                origin, mixture = start, Mixture(phase.mixture, seed=_seed(seed, start))
            if phase.sequence_length is not None:
                length = None if phase.sequence_length == sequence_length else phase.sequence_length
            # A phase from step 0 on takes the place of what the mixture says.
            planned = [*([] if start == 0 else planned), (start, origin, mixture, length)]
        mixtures = [mixture for _, _, mixture, _ in planned]
        self.sources = tuple(sorted({name for mixture in mixtures for name in mixture.sources}))
        """Names of all phases in alphabetical order; `locate` and `counts` speak of indices into it."""
        place = {name: index for index, name in enumerate(self.sources)}
        self.phases = tuple(
            Phase(
                start=start,
                origin=origin,
                mixture=mixture,
                segment_length=length,
                in_sources=np.array([place[name] for name in mixture.sources], dtype=np.int64),
            )
            for start, origin, mixture, length in planned
        )
        self._starts = np.array([phase.start for phase in self.phases], dtype=np.int64)
        self._before = [np.zeros(len(self.sources), dtype=np.int64)]
        for phase, after in pairwise(self.phases):
            went = self._within(phase, after.start - phase.origin) if after.origin == after.start else 0
            self._before.append(self._before[-1] + went)

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For positions in the order: index of the source, and how many of its samples stand before; both [n]."""
        sources, ordinals = np.empty_like(positions), np.empty_like(positions)
        numbers = self._numbers(positions)
        for number in np.unique(numbers).tolist():
            here, phase = numbers == number, self.phases[number]
            kinds, counts = phase.mixture.locate(positions[here] - phase.origin)
            sources[here] = phase.in_sources[kinds]
            ordinals[here] = counts + self._before[number][sources[here]]
        return sources, ordinals

    def segment_lengths(self, positions: NDArray[np.int64], whole: int) -> NDArray[np.int64]:
        """Where attention begins anew in the sample at each position, `whole` where nowhere; [n]."""
        lengths = np.array([phase.segment_length or whole for phase in self.phases], dtype=np.int64)
        return lengths[self._numbers(positions)]

    def counts(self, position: int) -> NDArray[np.int64]:
        """Samples of each source before a position, [sources]."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._before[number] + self._within(self.phases[number], position - self.phases[number].origin)

    def begun(self, position: int) -> tuple[Phase, ...]:
        """The phases that had a say before a position; the first one always."""
        return tuple(phase for phase in self.phases if phase.start < position or phase.start == 0)

    def _numbers(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, positions, side="right") - 1

    def _within(self, phase: Phase, position: int) -> NDArray[np.int64]:
        counts = np.zeros(len(self.sources), dtype=np.int64)
        counts[phase.in_sources] = phase.mixture.counts(position)
        return counts


def _seed(seed: int, start: int) -> int:
    """The first phase's order is the plain one."""
    return seed if start == 0 else int(random_bits(1, "schedule", seed, start)[0])
