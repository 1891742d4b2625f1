"""Every stretching of rotary positions against `transformers`' own functions, and what a turn is."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model.config import ModelConfig, RopeScaling, RopeScalingConfig
from model.rope import RotaryTable, frequencies, local_rotary_table, rotary_table, rotate, table_factor

CASES: dict[str, tuple[RopeScalingConfig, dict[str, object], int]] = {
    "linear": (RopeScalingConfig(kind=RopeScaling.linear, factor=3.0), {}, 4096),
    "ntk": (RopeScalingConfig(kind=RopeScaling.ntk, factor=2.0, original_positions=512), {}, 4096),
    "ntk-not-longer": (RopeScalingConfig(kind=RopeScaling.ntk, factor=2.0, original_positions=512), {}, 300),
    "yarn": (RopeScalingConfig(kind=RopeScaling.yarn, factor=8.0, original_positions=512), {}, 4096),
    "yarn-narrow": (
        RopeScalingConfig(
            kind=RopeScaling.yarn, factor=4.0, original_positions=128, beta_fast=16.0, beta_slow=2.0, truncate=False
        ),
        {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        512,
    ),
    "yarn-deepseek": (
        RopeScalingConfig(
            kind=RopeScaling.yarn, factor=40.0, original_positions=4096, mscale=1.0, mscale_all_dim=0.707
        ),
        {"mscale": 1.0, "mscale_all_dim": 0.707},
        4096,
    ),
    "yarn-given": (
        RopeScalingConfig(kind=RopeScaling.yarn, factor=4.0, original_positions=256, attention_factor=1.3),
        {"attention_factor": 1.3},
        1024,
    ),
    "llama3": (
        RopeScalingConfig(factor=8.0, original_positions=256, low_frequency_factor=1.0, high_frequency_factor=4.0),
        {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        2048,
    ),
}
_THEIR_NAME = {RopeScaling.ntk: "dynamic"}


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_the_frequencies_are_those_of_transformers(name: str, share: float) -> None:
    scaling, more, length = CASES[name]
    their_name = _THEIR_NAME.get(scaling.kind, scaling.kind.value)
    parameters = {"rope_type": their_name, "rope_theta": 5000.0, "factor": scaling.factor, **more}
    parameters["partial_rotary_factor"] = share
    if their_name in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = scaling.original_positions
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, max_position_embeddings=scaling.original_positions,
        rope_parameters=parameters,
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[their_name](config, torch.device("cpu"), seq_len=length)
    found = frequencies(channels=int(32 * share), base=5000.0, scaling=scaling, sequence_length=length)
    torch.testing.assert_close(found.float(), expected, rtol=2e-6, atol=0)
    assert table_factor(scaling) == pytest.approx(factor, rel=1e-12)
    plain = frequencies(channels=int(32 * share), base=5000.0, scaling=RopeScalingConfig(), sequence_length=length)
    assert torch.equal(found, plain) == (name == "ntk-not-longer")


def test_a_factor_of_one_is_no_stretching_of_any_kind() -> None:
    tables = [
        RotaryTable(
            channels=8, base=100.0, sequence_length=16, dtype=torch.float64, scaling=RopeScalingConfig(kind=kind)
        )
        for kind in RopeScaling
    ]
    assert all(torch.equal(table.table, tables[0].table) for table in tables)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    table = RotaryTable(channels=8, base=100.0, sequence_length=16, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 11]])
    heads = torch.randn(3, 1, 2, 8, dtype=torch.float64)
    turned = rotate(heads, *table(positions))
    as_complex = torch.complex(heads[..., :4], heads[..., 4:])
    angles = torch.tensor([[p * 100.0 ** (-i / 4) for i in range(4)] for p in (0, 5, 11)], dtype=torch.float64)
    expected = as_complex * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))
    wide = torch.cat((heads, heads[..., :3]), dim=-1)
    partly = rotate(wide, *table(positions))
    assert torch.equal(partly[..., :8], turned)
    assert torch.equal(partly[..., 8:], wide[..., 8:])


def test_layers_with_a_window_may_have_a_base_of_their_own_that_is_not_stretched() -> None:
    config = ModelConfig(
        layers=2, hidden_size=32, heads=4, ffn_hidden_size=48, rope_base=500.0, rope_local_base=50.0,
        rope_scaling=RopeScalingConfig(kind=RopeScaling.linear, factor=8.0),
    )  # fmt: skip
    local = local_rotary_table(config, sequence_length=8, dtype=torch.float64)
    assert local is not None
    expected = RotaryTable(channels=8, base=50.0, sequence_length=8, dtype=torch.float64)
    assert torch.equal(local.table, expected.table)
    assert not torch.equal(rotary_table(config, sequence_length=8, dtype=torch.float64).table, expected.table)
