"""What is multiplied by torch alone where no tensor rank shares a matrix is what megatron-core's own layers compute."""

from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from model import build
from model.config import MoeConfig
from parallel.config import Logits
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth]


def gradients(case: Case) -> tuple[dict[str, Tensor], int]:
    """The loss and the gradients of a step by parameter, and how many linears do not go megatron-core's way."""
    engine = engine_of(case)
    loss = engine.accumulate(batch_of(case, 0, engine.topology)).loss
    linears = [
        module
        for module in engine.updater.module.modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear) and "forward" in vars(module)
    ]
    found = {local.name: engine.updater.gradient(local).clone() for local in engine.parameters}
    return {"loss": loss, **found}, len(linears)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("experts", [0, 4])
def test_matrices_of_one_tensor_rank(monkeypatch: pytest.MonkeyPatch, biased: bool, experts: int) -> None:
    case = tiny(dtype=torch.float64, zero_stage=0, tied=not biased, logits=Logits.whole)
    moe = MoeConfig(experts=experts, ffn_hidden_size=32)
    model = replace(case.config.model, linear_bias=biased and not experts, attention_bias=biased, moe=moe)
    case = replace(case, config=replace(case.config, model=model))
    ((ours, direct),) = run_world(gradients, 1, case)
    monkeypatch.setattr(build, "unsplit_linears", lambda _chunk, **_options: None)
    ((theirs, none),) = run_world(gradients, 1, case)
    assert (direct > 4 * model.layers, none) == (True, 0)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=1e-15)
