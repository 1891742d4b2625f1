"""How far a run is: the one thing that changes while the configuration stays frozen."""

from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.batch_sizes import BatchSizes


class Progress:
    """Steps and samples done of a run of known length; a checkpoint keeps it."""

    def __init__(self, *, total_steps: int, batch_sizes: BatchSizes, sequence_length: int) -> None:
        self.total_steps = total_steps
        self.step = 0
        self.samples = 0
        """Samples seen, those that only fill a batch excepted."""
        self.tokens = 0
        """Tokens seen."""
        self._batch_sizes = batch_sizes
        self._sequence_length = sequence_length

    @property
    def remaining_tokens(self) -> int:
        """Tokens still to see."""
        ahead = self._batch_sizes.position(self.total_steps) - self._batch_sizes.position(self.step)
        return ahead * self._sequence_length

    @property
    def done(self) -> bool:
        """Whether the last step was taken."""
        return self.step >= self.total_steps

    def remaining(self) -> Iterator[int]:
        """Numbers of the steps still to take, counted from 1."""
        yield from range(self.step + 1, self.total_steps + 1)

    def advance(self) -> None:
        """One step was taken."""
        size = self._batch_sizes.at(self.samples)
        self.step += 1
        self.samples += size
        self.tokens += size * self._sequence_length

    def state_dict(self) -> dict[str, Any]:
        """JSON."""
        return {"step": self.step, "samples": self.samples, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the step that was saved."""
        self.step, self.samples, self.tokens = state["step"], state["samples"], state["tokens"]


class Every:
    """When something is due: at the multiples of each interval that is not None, and at the steps named besides."""

    def __init__(self, *intervals: int | None, besides: Sequence[int] = ()) -> None:
        self._intervals = [interval for interval in intervals if interval is not None]
        self._besides = besides

    def due(self, step: int) -> bool:
        """Whether it is due after this step."""
        return step in self._besides or any(step % interval == 0 for interval in self._intervals)
