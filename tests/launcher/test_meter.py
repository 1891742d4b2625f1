"""What counts as a step that went wrong."""

import math

import pytest
import torch

from launcher.meter import finite
from parallel.engine import StepResult


def result(loss: float, grad_norm: float, *, skipped: bool = False) -> StepResult:
    return StepResult(
        loss=torch.tensor(loss),
        weight=torch.tensor(1.0),
        grad_norm=torch.tensor(grad_norm),
        learning_rate=0.1,
        skipped=skipped,
        seconds={},
    )


def test_a_step_that_was_skipped_for_its_loss_scale_has_no_norm_and_is_no_failure() -> None:
    assert finite(result(2.0, 3.0), 1) == (2.0, 3.0)
    assert finite(result(2.0, math.inf, skipped=True), 1) == (2.0, None)


@pytest.mark.parametrize(
    "wrong", [result(math.nan, 1.0), result(1.0, math.inf), result(1.0, math.nan), result(math.inf, 1.0, skipped=True)]
)
def test_what_is_not_finite_ends_the_run(wrong: StepResult) -> None:
    with pytest.raises(FloatingPointError, match="step 7 has the loss"):
        finite(wrong, 7)
