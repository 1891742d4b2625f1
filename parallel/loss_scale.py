"""Dynamic loss scaling, for fp16, whose smallest normal number is 6e-5 (Micikevicius et al., 2018, arXiv:1710.03740).

The loss is multiplied by a power of two, so that small gradients do not become zero, and gradients are divided by it
before anybody looks at them. A step whose gradients overflow is not taken and halves the scale; after many steps in a
row without an overflow the scale doubles. At the smallest scale an overflow is no matter of course any more: the step
is reported like any other whose gradients are not finite, which ends the run.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FIRST, _SMALLEST, _LARGEST = 2.0**16, 1.0, 2.0**24
_STEPS_TO_GROW = 1000
"""Steps in a row without an overflow after which the scale doubles."""


class LossScale:
    """The scale of one run; where it is not `dynamic` it is 1 and never changes.

    Attributes:
        value: what the next backward passes are multiplied by.
        skipped: whether the last step was not taken because the scale was too large.
        steps_not_taken: how many steps of the run changed no weight, for whatever reason; whoever refuses one says so.
    """

    def __init__(self, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = _FIRST if dynamic else 1.0
        self.skipped = False
        self.steps_not_taken = 0
        self._good_steps = 0

    def update(self, *, overflowed: bool) -> None:
        """Learns whether a step's gradients overflowed, so that it was not taken; the same on all ranks."""
        self.skipped = overflowed and self.value > _SMALLEST
        self.steps_not_taken += self.skipped
        if not self.dynamic:
            return
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.value = max(_SMALLEST, self.value / 2)
        elif self._good_steps % _STEPS_TO_GROW == 0:
            self.value = min(_LARGEST, self.value * 2)

    def refusal(self, norm: Tensor, refuses: Callable[[Tensor], Tensor]) -> Tensor:
        """Whether a step with this gradient norm [] is not taken, [] float32 on its device: 1 or 0.

        A dynamic scale reads the norm, which waits for the device. At the smallest scale an overflow is for `refuses`
        to judge; whatever it says, that step is not taken.
        """
        if not self.dynamic:
            return refuses(norm)
        overflowed = not norm.isfinite().item()
        self.update(overflowed=overflowed)
        one = torch.ones((), dtype=torch.float32, device=norm.device)
        if self.skipped:
            return one
        refused = refuses(norm)
        return one if overflowed else refused

    def refused(self) -> None:
        """Learns that a step was not taken for a reason that is not the scale's; the same on all ranks."""
        self.steps_not_taken += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same bits; JSON."""
        return {
            "value": self.value if self.dynamic else None,
            "good_steps": self._good_steps,
            "steps_not_taken": self.steps_not_taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`; one of another precision has no scale to go on from."""
        self.steps_not_taken = state["steps_not_taken"]
        if self.dynamic and state["value"] is not None:
            self.value, self._good_steps = state["value"], state["good_steps"]
