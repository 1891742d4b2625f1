"""What the list of layouts does not ask: bf16 to the bit of its roundings, and steps cut into other micro-batches.

tests/layouts.yaml holds every layout against one rank, bf16 no further from fp32 than one rank's bf16 is. Where a
layout rounds the same numbers in the same order (data and pipeline parallelism) it must do better: equal one rank's
bf16 to 1e-6, with gradients summed in fp32.
"""

from functools import cache
from typing import Any

import pytest
import torch

from launcher.verify.compare import Tensors, whole, worst
from launcher.verify.measure import Case, found
from launcher.verify.world import run_world
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2-zero1": (2, {"zero_stage": 1}),
    "dp2-zero1-tied": (2, {"zero_stage": 1, "tied": True}),
    "dp2-zero2": (2, {"zero_stage": 2}),
    "dp2-zero3": (2, {"zero_stage": 3}),
    "pp2-zero0": (2, {"zero_stage": 0, "pipeline": 2}),
    "pp2-vpp2-zero1": (2, {"zero_stage": 1, "pipeline": 2, "virtual_pipeline": 2}),
    "pp2-dp2-zero1": (4, {"zero_stage": 1, "pipeline": 2}),
    "pp2-dp2-zero2": (4, {"zero_stage": 2, "pipeline": 2}),
}


def measured(case: Case) -> tuple[list[float], list[float], Tensors]:
    """Losses and norms of two steps, the same on every rank, and the first step's gradients."""
    answers = run_world(lambda: found(case, steps=2), case.ranks)
    assert all(answer.losses == answers[0].losses for answer in answers)
    assert all(answer.norms == answers[0].norms for answer in answers)
    gradients = whole([answer.gradients[0] for answer in answers])
    assert not gradients.copies, f"copies differ: {list(gradients.copies)}"
    return answers[0].losses, answers[0].norms, gradients.tensors


@cache
def one_rank(tied: bool) -> tuple[list[float], list[float], Tensors]:
    return measured(tiny(dtype=torch.bfloat16, tied=tied, zero_stage=0))


@pytest.mark.parametrize("name", CASES)
def test_bf16_rounds_as_one_rank_does(name: str) -> None:
    ranks, layout = CASES[name]
    losses, norms, gradients = measured(tiny(ranks, dtype=torch.bfloat16, **layout))
    its_losses, its_norms, its_gradients = one_rank(layout.get("tied", False))
    error, parameter = worst(gradients, its_gradients)
    assert error <= 1e-6, parameter
    assert losses[0] == pytest.approx(its_losses[0], rel=1e-6)
    assert norms[0] == pytest.approx(its_norms[0], rel=1e-6)
    # The second step follows an AdamW update, which turns a rounding of a tiny gradient into a step of full size.
    assert losses[1] == pytest.approx(its_losses[1], rel=1e-4)
    assert norms[1] == pytest.approx(its_norms[1], rel=1e-4)


def test_clipping_and_accumulation_do_not_depend_on_the_micro_batch() -> None:
    """Samples that count unequally, in one micro-batch or in eight."""
    one, two, eight = (measured(tiny(micro_batch_size=size)) for size in (1, 2, 8))
    for losses, norms, gradients in (two, eight):
        assert worst(gradients, one[2])[0] < 2e-6
        assert losses[0] == pytest.approx(one[0][0], rel=1e-6)
        assert norms[0] == pytest.approx(one[1][0], rel=1e-6)
