"""A golden run: twenty steps of a tiny model whose losses were recorded once.

It answers a question that no comparison of layouts does: has any change moved the numbers of everything alike, initial
values, order of operations, schedule, optimizer? A change that should not move them must leave `losses.json` as it is;
one that should records it anew (`python -m tests.golden.test_golden`) and says why in its message.
"""

import json
from pathlib import Path

import pytest
import torch

from launcher.verify.measure import Case, found
from launcher.verify.world import run_world
from tests.distributed.layouts import tiny

RECORDED = Path(__file__).with_name("losses.json")
STEPS = 20

pytestmark = [pytest.mark.distributed, pytest.mark.truth]


ONE_RANK = tiny(dtype=torch.float64, tied=True, zero_stage=0)


def losses(case: Case) -> list[float]:
    """The loss of each step, nats."""
    return run_world(lambda: found(case, steps=STEPS).losses, case.ranks)[0]


def test_float64_gives_the_recorded_losses() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert losses(ONE_RANK) == pytest.approx(recorded, rel=1e-9)


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}],
    ids=["data", "tensor", "interleaved"],
)
def test_fp32_follows_them_in_every_layout(layout: dict[str, int]) -> None:
    recorded = json.loads(RECORDED.read_text())
    assert losses(tiny(2, tied=True, micro_batch_size=4, **layout)) == pytest.approx(recorded, rel=1e-4)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(losses(ONE_RANK), indent=2) + "\n")
