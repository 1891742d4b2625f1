"""Parameter counts equal the published ones, and those of the modules that are really built."""

from dataclasses import replace

import pytest

from launcher.verify.measure import engine_of
from launcher.verify.world import run_world
from model.config import Activation, LatentConfig, ModelConfig, MoeConfig, Norm
from model.size import flops_per_token, parameter_count
from tests.distributed.layouts import MODEL, VOCABULARY, tiny

LLAMA_3_8B = ModelConfig(layers=32, hidden_size=4096, heads=32, kv_heads=8, ffn_hidden_size=14336)


def test_the_published_count_of_llama_3_8b() -> None:
    assert parameter_count(LLAMA_3_8B, 128256) == 8_030_261_248


MIXTRAL_8X7B = ModelConfig(
    layers=32, hidden_size=4096, heads=32, kv_heads=8, ffn_hidden_size=14336, moe=MoeConfig(experts=8, top_k=2)
)


def test_the_published_counts_of_a_mixture() -> None:
    """46.7 B parameters in all; a token passes 12.9 B, of which the input embedding computes nothing."""
    assert parameter_count(MIXTRAL_8X7B, 32000) == 46_702_792_704
    active = flops_per_token(MIXTRAL_8X7B, 32000, 0, causal=True) / 6 + 32000 * 4096
    assert round(active / 1e9, 1) == 12.9


LATENT = replace(
    MODEL,
    kv_heads=None,
    head_size=12,
    latent=LatentConfig(kv_rank=14, q_rank=18, rope_head_size=4, value_head_size=10),
)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        replace(MODEL, attention_bias=True, qk_norm=True),
        replace(MODEL, linear_bias=True, tie_embeddings=True),
        replace(MODEL, linear_bias=True, activation=Activation.exact_gelu, norm=Norm.layer, rope_share=0.5),
        replace(MODEL, post_norms=True, norm=Norm.zero_centered_rms, qk_norm=True),
        replace(MODEL, moe=MoeConfig(experts=4, ffn_hidden_size=16, shared_ffn_hidden_size=8, first_layer=1)),
        replace(LATENT, moe=MoeConfig(experts=4, ffn_hidden_size=16, expert_bias=True, first_layer=1)),
        replace(LATENT, latent=replace(LATENT.latent, q_rank=None)),
    ],
    ids=[
        "plain",
        "attention-bias-and-qk-norm",
        "bias-and-tied",
        "neox",
        "gemma",
        "experts",
        "latent-and-experts",
        "latent",
    ],
)
def test_the_count_is_what_is_built(model: ModelConfig) -> None:
    case = tiny(zero_stage=0)
    case = replace(case, config=replace(case.config, model=model))
    (built,) = run_world(lambda: sum(local.shape.numel() for local in engine_of(case).parameters), 1)
    assert built == parameter_count(model, VOCABULARY)


def test_flops_of_latent_attention_by_hand() -> None:
    """Scores cost head_size a pair, and what they weigh value_head_size."""
    heads, size, values = 4, 12, 10
    pairs = flops_per_token(LATENT, 128, 100, causal=False) - flops_per_token(LATENT, 128, 0, causal=False)
    assert pairs == 6 * LATENT.layers * heads * (size + values) * 100


def test_flops_of_two_stacks_by_hand() -> None:
    """Per token of the encoder: a row of 40 of them has 10 of the decoder's."""
    config = ModelConfig(
        layers=2, decoder_layers=3, hidden_size=8, heads=2, head_size=5, ffn_hidden_size=16, activation=Activation.relu
    )
    own, mlp = 4 * 8 * 10, 2 * 8 * 16
    read = 40 * (2 * (own + mlp) + 3 * 2 * 8 * 10)  # keys and values of three cross attentions are of what was read
    told = 10 * (3 * (own + mlp + 2 * 8 * 10) + 8 * 128)
    for causal, seen in ((False, 10), (True, 5)):
        pairs = 2 * 40 * 40 + 3 * 10 * (seen + 40)
        expected = (6 * (read + told) + 12 * 10 * pairs) / 40
        assert flops_per_token(config, 128, 40, causal=causal, decoder_length=10) == pytest.approx(expected, rel=1e-12)


def test_flops_by_hand() -> None:
    config = ModelConfig(layers=2, hidden_size=8, heads=2, ffn_hidden_size=16)
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 16) + 8 * 128
    assert flops_per_token(config, 128, 10, causal=False) == 6 * matrices + 2 * 12 * 8 * 10
    assert flops_per_token(config, 128, 10, causal=True) == 6 * matrices + 2 * 6 * 8 * 10


def test_a_window_costs_what_its_band_holds() -> None:
    """Over 1000 tokens with a window of 100: 100 for each token, but for the first 100, which see half as many."""
    config = ModelConfig(layers=4, hidden_size=8, heads=2, ffn_hidden_size=16, sliding_window=100)
    without = flops_per_token(config, 128, 0, causal=True)
    band = (100 * 1000 - 100 * 100 / 2) / 1000
    assert flops_per_token(config, 128, 1000, causal=True) - without == 4 * 12 * 8 * band
    alternating = replace(config, full_attention_every=2)
    assert flops_per_token(alternating, 128, 1000, causal=True) - without == 2 * 12 * 8 * (band + 500)
    assert flops_per_token(config, 128, 50, causal=True) - without == 4 * 6 * 8 * 50
