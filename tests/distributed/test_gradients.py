"""The gradient matrix: every layout against one rank, parameter by parameter.

One rank at stage 0 (plain torch, no DeepSpeed) is the oracle. float64 at stage 0 must agree to 1e-11; fp32 under ZeRO
to 2e-6; bf16 exactly as far as the same roundings happen in the same order (data and pipeline parallelism), and
elsewhere it must be no further from fp32 than one rank's bf16 is.
"""

from functools import cache
from typing import Any

import pytest
import torch

from launcher.verify.compare import Tensors, whole, worst
from launcher.verify.measure import Case, Shards, found
from launcher.verify.world import run_world
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp1": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2, "sequence_parallel": False}),
    "tp2-sp": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2-vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2-sp-pp2": (4, {"tensor": 2, "pipeline": 2}),
    "pp2-dp2": (4, {"pipeline": 2}),
    "tp2-sp-dp2": (4, {"tensor": 2}),
}


def case_of(shape: str, stage: int, dtype: torch.dtype, tied: bool) -> Case:
    ranks, layout = SHAPES[shape]
    return tiny(ranks, dtype=dtype, tied=tied, zero_stage=stage, **layout)


def rows(dtype: torch.dtype, stages: tuple[int, ...]) -> list[Any]:
    """The legal rows: no pipeline at stage 3, four ranks at stages 0 and 1, a tied embedding where a pipeline cuts it.

    tests/distributed/test_layouts.py and `bloomery verify --matrix tests/layouts.yaml` have all other dimensions.
    """
    return [
        pytest.param(case_of(shape, stage, dtype, tied), id=f"{shape}-zero{stage}{'-tied' if tied else ''}")
        for stage in stages
        for shape, (ranks, layout) in SHAPES.items()
        for tied in ((False, True) if "pipeline" in layout or shape == "dp2" else (False,))
        if not (stage == 3 and "pipeline" in layout) and not (stage > 1 and ranks == 4)
    ]


def measured(case: Case) -> dict[str, Any]:
    """What the whole world found; losses and norms are the same on every rank."""
    answers = run_world(lambda: found(case, steps=2), case.ranks)
    for answer in answers[1:]:
        assert answer.losses == answers[0].losses
        assert answer.norms == answers[0].norms
    return {
        "losses": answers[0].losses,
        "norms": answers[0].norms,
        "evaluated": answers[0].evaluated,
        "gradient": together([answer.gradients[0] for answer in answers]),
    }


def together(per_rank: list[Shards]) -> Tensors:
    found = whole(per_rank)
    assert not found.copies, f"copies differ: {list(found.copies)}"
    return found.tensors


@cache
def oracle(dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    return measured(case_of("dp1", 0, dtype, tied))


def compare(case: Case, tolerance: float) -> None:
    ours, reference = measured(case), oracle(case.dtype, case.config.model.tie_embeddings)
    error, name = worst(ours["gradient"], reference["gradient"])
    assert error <= tolerance, f"gradient of {name}: {error:.1e}"
    assert ours["losses"][0] == pytest.approx(reference["losses"][0], rel=tolerance)
    assert ours["norms"][0] == pytest.approx(reference["norms"][0], rel=tolerance)
    # The second step follows an AdamW update, which turns a rounding of a tiny gradient into a step of full size.
    assert ours["losses"][1] == pytest.approx(reference["losses"][1], rel=100 * tolerance)
    assert ours["norms"][1] == pytest.approx(reference["norms"][1], rel=100 * tolerance)
    assert ours["evaluated"] == pytest.approx(reference["evaluated"], rel=100 * tolerance)


@pytest.mark.parametrize("case", rows(torch.float64, (0,)))
def test_float64_equals_one_rank(case: Case) -> None:
    compare(case, 1e-11)


@pytest.mark.parametrize("case", rows(torch.float32, (1, 2, 3)))
def test_fp32_equals_one_rank(case: Case) -> None:
    compare(case, 2e-6)


@pytest.mark.parametrize("case", rows(torch.bfloat16, (0, 1, 2, 3)))
def test_bf16_rounds_as_one_rank_does(case: Case) -> None:
    layout, tied = case.config.parallel, case.config.model.tie_embeddings
    if layout.tensor == 1 and not (tied and layout.pipeline > 1):
        compare(case, 1e-6)
        return
    exact, rounded = oracle(torch.float32, tied), oracle(torch.bfloat16, tied)
    ours = measured(case)
    allowed = 1.5 * worst(rounded["gradient"], exact["gradient"])[0]
    assert worst(ours["gradient"], exact["gradient"])[0] <= allowed
    assert ours["losses"][0] == pytest.approx(exact["losses"][0], rel=5e-4)
    assert ours["norms"][0] == pytest.approx(exact["norms"][0], rel=5e-3)


def test_clipping_and_accumulation_do_not_depend_on_the_micro_batch() -> None:
    """Samples that count unequally, in one micro-batch or in eight."""
    one, two, eight = (measured(tiny(micro_batch_size=size)) for size in (1, 2, 8))
    for other in (two, eight):
        assert worst(other["gradient"], one["gradient"])[0] < 2e-6
        assert other["losses"][0] == pytest.approx(one["losses"][0], rel=1e-6)
