"""The exponential average of the weights over the steps (Polyak and Juditsky, 1992), kept beside them.

    average <- average + (1 - d) x (weight - average),  d = min(decay, n / (n + 1)) at the n-th step, counted from 0

so that it is the plain mean of all steps until there are 1 / (1 - decay) of them, and no step counts for the value that
training began with. Each rank averages what it holds of the masters, in float32, so it is the same in every layout, is
sharded as they are, and needs no communication. A checkpoint keeps it as `average.NAME`; any layout loads it, and
`bloomery checkpoint export --average` writes it for Hugging Face's libraries.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from parallel.fragments import Held
from parallel.precision import exact

AVERAGE = "average"


class WeightAverage(Held):
    """A checkpoint's participant that follows the weights."""

    @torch.no_grad()
    def __init__(self, weights: Callable[[], Iterable[ShardedTensor]], *, decay: float) -> None:
        """`weights` gives what this rank holds of the masters, named `weight.NAME`: live memory."""
        super().__init__(self._averages, loaded=lambda: None)
        self._weights = weights
        self._decay = decay
        self.values = [_wide(piece).clone() for piece in weights()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the weights after a step (counted from 1) in."""
        decay = min(self._decay, (step - 1) / step)
        for value, piece in zip(self.values, self._weights(), strict=True):
            value.lerp_(_wide(piece), 1 - decay)

    def _averages(self) -> Iterator[ShardedTensor]:
        for value, piece in zip(self.values, self._weights(), strict=True):
            name = piece.key.partition(".")[2]
            yield replace(piece, key=f"{AVERAGE}.{name}", data=value, dtype=value.dtype)


def _wide(piece: ShardedTensor) -> Tensor:
    assert piece.data is not None
    return exact(piece.data)
