"""The arithmetic of the loss scale: down on an overflow, up after a thousand good steps, within its limits."""

import torch

from parallel.loss_scale import LossScale


def test_a_run_that_needs_no_scale_has_one() -> None:
    scale = LossScale(dynamic=False)
    scale.update(overflowed=False)
    assert (scale.value, scale.skipped, scale.steps_not_taken) == (1.0, False, 0)


def test_an_overflow_halves_the_scale_and_is_no_failure() -> None:
    scale = LossScale(dynamic=True)
    first = scale.value
    scale.update(overflowed=True)
    assert (scale.value, scale.skipped, scale.steps_not_taken) == (first / 2, True, 1)
    scale.update(overflowed=False)
    assert (scale.value, scale.skipped, scale.steps_not_taken) == (first / 2, False, 1)


def test_the_scale_doubles_after_a_thousand_good_steps_in_a_row() -> None:
    scale = LossScale(dynamic=True)
    first = scale.value
    for overflowed in [*[False] * 999, True, *[False] * 999]:
        scale.update(overflowed=overflowed)
    assert scale.value == first / 2
    scale.update(overflowed=False)
    assert scale.value == first
    for _ in range(100_000):
        scale.update(overflowed=False)
    assert scale.value == 2.0**24


def test_an_overflow_at_the_smallest_scale_is_a_failure() -> None:
    scale = LossScale(dynamic=True)
    while scale.value > 1:
        scale.update(overflowed=True)
        assert scale.skipped
    taken = scale.steps_not_taken
    scale.update(overflowed=True)
    assert (scale.value, scale.skipped, scale.steps_not_taken) == (1.0, False, taken), "whoever refuses it counts it"


def test_a_step_that_is_not_finite_without_a_scale_is_a_failure() -> None:
    scale = LossScale(dynamic=False)
    assert scale.refusal(torch.tensor(torch.nan), lambda norm: 1 - norm.isfinite().float()) == 1
    assert (scale.value, scale.skipped, scale.steps_not_taken) == (1.0, False, 0)
    scale.refused()
    assert scale.steps_not_taken == 1


def test_it_goes_on_where_it_stopped() -> None:
    scale, other = LossScale(dynamic=True), LossScale(dynamic=True)
    for overflowed in [True, *[False] * 990]:
        scale.update(overflowed=overflowed)
    other.load_state_dict(scale.state_dict())
    for _ in range(20):
        scale.update(overflowed=False)
        other.update(overflowed=False)
    assert other.state_dict() == scale.state_dict()


def test_a_run_that_changes_its_precision_starts_with_a_fresh_scale_and_knows_its_steps() -> None:
    fp16, bf16 = LossScale(dynamic=True), LossScale(dynamic=False)
    fp16.update(overflowed=True)
    bf16.load_state_dict(fp16.state_dict())
    assert (bf16.value, bf16.steps_not_taken) == (1.0, 1)
    again = LossScale(dynamic=True)
    again.load_state_dict(bf16.state_dict())
    assert (again.value, again.steps_not_taken) == (2.0**16, 1)
