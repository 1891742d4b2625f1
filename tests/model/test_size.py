"""Parameter counts equal the published ones, and those of the modules that are really built."""

import pytest

from model.config import ModelConfig
from model.size import flops_per_token, parameter_count
from parallel.config import ParallelConfig
from tests.distributed.layouts import MODEL, VOCABULARY, Row, make_engine
from tests.distributed.world import run_world

LLAMA_3_8B = ModelConfig(layers=32, hidden_size=4096, heads=32, kv_heads=8, ffn_hidden_size=14336)


def test_the_published_count_of_llama_3_8b() -> None:
    assert parameter_count(LLAMA_3_8B, 128256) == 8_030_261_248


@pytest.mark.distributed
def test_the_count_is_what_is_built() -> None:
    row = Row(name="", ranks=1, layout=ParallelConfig(zero_stage=0))
    (built,) = run_world(lambda: sum(local.shape.numel() for local in make_engine(row).parameters), 1)
    assert built == parameter_count(MODEL, VOCABULARY)


def test_flops_by_hand() -> None:
    config = ModelConfig(layers=2, hidden_size=8, heads=2, ffn_hidden_size=16)
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 16) + 8 * 128
    assert flops_per_token(config, 128, 10, causal=False) == 6 * matrices + 2 * 12 * 8 * 10
    assert flops_per_token(config, 128, 10, causal=True) == 6 * matrices + 2 * 6 * 8 * 10
