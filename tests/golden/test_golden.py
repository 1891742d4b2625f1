"""A golden run: twenty steps of a tiny model whose losses were recorded once.

It answers a question that no comparison of layouts does: has any change moved the numbers of everything alike, initial
values, order of operations, schedule, optimizer? A change that should not move them must leave `losses.json` as it is;
one that should records it anew (`python -m tests.golden.test_golden`) and says why in its message.
"""

import json
from pathlib import Path

import pytest
import torch

from parallel.config import ParallelConfig
from tests.distributed.layouts import Row, found
from tests.distributed.world import run_world

RECORDED = Path(__file__).with_name("losses.json")
STEPS = 20

pytestmark = [pytest.mark.distributed, pytest.mark.truth]


def losses(dtype: torch.dtype, ranks: int, layout: ParallelConfig) -> list[float]:
    """The loss of each step, nats."""
    row = Row(name="golden", ranks=ranks, layout=layout, dtype=dtype, tied=True)
    return run_world(found, ranks, row, STEPS)[0]["losses"]


def test_float64_gives_the_recorded_losses() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert losses(torch.float64, 1, ParallelConfig(zero_stage=0)) == pytest.approx(recorded, rel=1e-9)


@pytest.mark.parametrize(
    "layout",
    [ParallelConfig(zero_stage=1), ParallelConfig(tensor=2), ParallelConfig(pipeline=2, virtual_pipeline=2)],
    ids=["data", "tensor", "interleaved"],
)
def test_fp32_follows_them_in_every_layout(layout: ParallelConfig) -> None:
    recorded = json.loads(RECORDED.read_text())
    assert losses(torch.float32, 2, layout) == pytest.approx(recorded, rel=1e-4)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(losses(torch.float64, 1, ParallelConfig(zero_stage=0)), indent=2) + "\n")
