"""Dropout whose masks are the same in every layout, and the residual connections that it sits on.

The idea: no random state at all. Whether an element is dropped is a hash of (seed, sample, place of the token in its
row, layer, place in the layer, channel). So tensor, context and pipeline ranks drop what one rank would have dropped,
a recomputed forward pass drops the same again, and a resumed run goes on as if it had not stopped; one rank is the
oracle of a run with dropout too.

The trade-off: some ten integer operations an element, where a fused kernel has a cheaper generator. Probabilities of
attention are not dropped: no fast attention kernel would drop the same ones in two layouts.

The mixing function is the finaliser of SplitMix64 (Steele et al., 2014, doi:10.1145/2660193.2660195).
"""

from collections.abc import Callable

import torch
import xxhash
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from model.layer_context import LayerContext


def _signed(number: int) -> int:
    """An unsigned 64-bit number as the int64 of the same bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


_GOLDEN, _SAMPLE = _signed(0x9E3779B97F4A7C15), _signed(0xABC98388FB8FAC03)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_STREAM = 0xD1B54A32D192ED03
_UNIT_BITS = 53


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int64."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(numbers: Tensor) -> Tensor:
    numbers = (numbers ^ _shifted(numbers, 30)) * _FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * _SECOND
    return numbers ^ _shifted(numbers, 31)


def token_keys(seed: int, sample_ids: Tensor, places: Tensor) -> Tensor:
    """A number for each token, [sequence, batch] int64, from sample ids [batch] and places in the row [sequence]."""
    base = _signed(xxhash.xxh3_64_intdigest(f"{seed}:dropout".encode()))
    return _mixed(_mixed(sample_ids * _SAMPLE + base)[None] + places[:, None] * _GOLDEN)


def kept(keys: Tensor, *, channels: int, stream: int, share: float, first: int = 0) -> Tensor:
    """Which elements [sequence, batch, channels] stay when `share` of them are dropped; a stream for each place. The
    channels are those from `first` on."""
    token = _mixed(keys + _signed(stream * _STREAM % (1 << 64)))[..., None]
    channel = torch.arange(first, first + channels, device=keys.device) * _GOLDEN
    return _shifted(_mixed(token + channel), 64 - _UNIT_BITS) >= int(share * (1 << _UNIT_BITS))


def drop(hidden: Tensor, keys: Tensor, *, stream: int, share: float, first: int = 0) -> Tensor:
    """[sequence, batch, hidden] with `share` of the elements zero and the others scaled up by as much."""
    mask = kept(keys, channels=hidden.shape[-1], stream=stream, share=share, first=first)
    return hidden * (mask.to(hidden.dtype) * (1 / (1 - share)))


class Residual(torch.nn.Module):
    """Adds what attention or an MLP found to the residual stream: bias, dropout, sum, and a norm of the sum if asked.

    It stands in megatron-core's bias-dropout-add slot. The block hands it the tokens before each forward pass, because
    that slot has no argument for them. Under sequence parallelism each tensor rank adds the bias to its own tokens, so
    the bias is read through an operation whose backward sums over the tensor ranks. `norm`, if given, is applied to the
    biased change (a norm that is registered elsewhere).
    """

    tokens: LayerContext

    def __init__(
        self,
        *,
        stream: int,
        share: float,
        sequence_parallel: bool,
        norm: Callable[[Tensor], Tensor] | None = None,
        sum_norm: torch.nn.Module | None = None,
    ) -> None:
        """`norm` is applied to what was found, `sum_norm` to the sum."""
        super().__init__()
        self.norm = norm
        self.sum_norm = sum_norm
        self.stream = stream
        self.share = share
        self.sequence_parallel = sequence_parallel

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """The function that adds, in training or in evaluation."""
        return self._add_in_training if training else self._add

    def _add(self, found: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
        return self._normed(residual + self._whole(found))

    def _add_in_training(self, found: tuple[Tensor, Tensor | None], residual: Tensor, _: float) -> Tensor:
        change = self._whole(found)
        if self.tokens.dropout_keys is not None and self.share:
            change = drop(change, self.tokens.dropout_keys, stream=self.stream, share=self.share)
        return self._normed(residual + change)

    def _normed(self, hidden: Tensor) -> Tensor:
        return hidden if self.sum_norm is None else self.sum_norm(hidden)

    def _whole(self, found: tuple[Tensor, Tensor | None]) -> Tensor:
        change, bias = found
        if bias is not None:
            change = change + (copy_to_tensor_model_parallel_region(bias) if self.sequence_parallel else bias)
        return change if self.norm is None else self.norm(change)
