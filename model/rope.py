"""Rotary positions and the ways to stretch them past the length that a model was trained on.

The idea: a table of cosines and sines for every position up to the sequence length, looked up by position, because
positions restart at each document. What differs between the ways is only how fast each pair of channels turns, and one
factor on cosines and sines; both are computed here in float64.

Sources: Su et al., 2021, arXiv:2104.09864; linear: Chen et al., 2023, arXiv:2306.15595; NTK and YaRN: Peng et al.,
2023, arXiv:2309.00071; llama3: Grattafiori et al., 2024, arXiv:2407.21783.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling, RopeScalingConfig
from model.mup import score_divisor


def ntk_base(base: float, scaling: RopeScalingConfig, *, channels: int, sequence_length: int) -> float:
    """The base period with which sequences of this length turn as far as those of the original length did."""
    reach = max(sequence_length, scaling.original_positions) / scaling.original_positions
    return base * (scaling.factor * reach - (scaling.factor - 1)) ** (channels / (channels - 2))


def _plain(channels: int, base: float) -> Tensor:
    return base ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


def _llama3(plain: Tensor, scaling: RopeScalingConfig) -> Tensor:
    waves = scaling.original_positions * plain / (2 * math.pi)  # of each pair in the original length
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = ((waves - low) / (high - low)).clamp(0, 1)  # 1 for short waves, 0 for long ones
    return plain * (kept + (1 - kept) / scaling.factor)


def _yarn(plain: Tensor, base: float, scaling: RopeScalingConfig) -> Tensor:
    channels = 2 * len(plain)

    def pair_that_turns(times: float) -> float:
        """Index of the pair that turns so many times in the original length."""
        return channels * math.log(scaling.original_positions / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    last = last if last != first else last + 0.001
    stretched = ((torch.arange(len(plain), dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
    return plain * (1 - stretched + stretched / scaling.factor)


def frequencies(*, channels: int, base: float, scaling: RopeScalingConfig, sequence_length: int) -> Tensor:
    """Radians per position of each pair of channels, [channels / 2] float64."""
    plain = _plain(channels, base)
    if scaling.factor == 1:
        return plain
    if scaling.kind is RopeScaling.linear:
        return plain / scaling.factor
    if scaling.kind is RopeScaling.ntk:
        return _plain(channels, ntk_base(base, scaling, channels=channels, sequence_length=sequence_length))
    return _llama3(plain, scaling) if scaling.kind is RopeScaling.llama3 else _yarn(plain, base, scaling)


def _growth(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of attention scores that grow flatter over longer sequences."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def table_factor(scaling: RopeScalingConfig) -> float:
    """What cosines and sines are multiplied by: 1 but in YaRN."""
    if scaling.kind is not RopeScaling.yarn or scaling.factor == 1:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _growth(scaling.factor, scaling.mscale) / _growth(scaling.factor, scaling.mscale_all_dim)
    return _growth(scaling.factor)


def score_scale(config: ModelConfig) -> float | None:
    """What attention scores are multiplied by; None for one over the square root of head_size."""
    divisor = config.query_pre_attention_scalar or score_divisor(config)
    if divisor is not None:
        return divisor**-0.5
    scaling = config.rope_scaling
    if config.latent.kv_rank is None or scaling.kind is not RopeScaling.yarn or not scaling.mscale_all_dim:
        return None
    # Most channels of a head made of a latent do not turn, so that the table's factor would not reach them.
    assert config.head_size is not None
    return config.head_size**-0.5 * _growth(scaling.factor, scaling.mscale_all_dim) ** 2


class RotaryTable(torch.nn.Module):
    """Cosines and sines of every position up to the sequence length; the halves of a head rotate against each other,
    as in Llama."""

    table: Tensor

    def __init__(
        self,
        *,
        channels: int,
        base: float,
        sequence_length: int,
        dtype: torch.dtype,
        scaling: RopeScalingConfig | None = None,
    ) -> None:
        super().__init__()
        scaling = scaling or RopeScalingConfig()
        radians = frequencies(channels=channels, base=base, scaling=scaling, sequence_length=sequence_length)
        angles = torch.arange(sequence_length, dtype=torch.float64)[:, None] * radians
        cosine, sine = angles.cos(), angles.sin()
        table = torch.stack((torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1)))
        table *= table_factor(scaling)
        self.register_buffer("table", table.to(dtype), persistent=False)  # [2, sequence, channels]

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [sequence, batch, 1, channels] of positions [batch, sequence]."""
        cosine, sine = self.table[:, positions.T, None]
        return cosine, sine


def rotary_table(config: ModelConfig, *, sequence_length: int, dtype: torch.dtype) -> RotaryTable:
    """The table of the layers that attend to whole documents."""
    return RotaryTable(
        channels=config.rotary_channels,
        base=config.rope_base,
        scaling=config.rope_scaling,
        sequence_length=sequence_length,
        dtype=dtype,
    )


def local_rotary_table(config: ModelConfig, *, sequence_length: int, dtype: torch.dtype) -> RotaryTable | None:
    """The table of the layers with a window, never stretched; None where it is the same."""
    if config.rope_local_base is None:
        return None
    base = config.rope_local_base
    return RotaryTable(channels=config.rotary_channels, base=base, sequence_length=sequence_length, dtype=dtype)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns the first channels of [sequence, batch, heads, head_size], as many as the table has, by the angles of
    their positions."""
    turning, still = heads.split((cosine.shape[-1], heads.shape[-1] - cosine.shape[-1]), dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = torch.addcmul(turning * cosine, torch.cat((second, first), dim=-1), sine)
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned
