"""What a record says of a step that went wrong."""

import math

import pytest
import torch

from launcher.meter import finite
from parallel.engine import StepResult


def result(loss: float, grad_norm: float) -> StepResult:
    return StepResult(
        loss=torch.tensor(loss),
        weight=torch.tensor(1.0),
        grad_norm=torch.tensor(grad_norm),
        learning_rate=0.1,
        refused=torch.zeros(()),
        seconds={},
    )


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (result(2.0, 3.0), (2.0, 3.0)),
        (result(2.0, math.inf), (2.0, None)),
        (result(math.nan, 1.0), (None, 1.0)),
        (result(-math.inf, math.nan), (None, None)),
    ],
)
def test_what_is_not_finite_is_no_number_of_a_record(
    found: StepResult, told: tuple[float | None, float | None]
) -> None:
    assert finite(found) == told
