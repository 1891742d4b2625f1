"""Masks that are a function of the token, not of a generator."""

import pytest
import torch

from model.dropout import Residual, drop, kept, token_keys
from model.layer_context import LayerContext

KEYS = token_keys(7, torch.arange(64), torch.arange(128))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(share: float) -> None:
    mask = kept(KEYS, channels=64, stream=3, share=share)
    deviation = (share * (1 - share) / mask.numel()) ** 0.5
    assert abs(1 - mask.double().mean().item() - share) < 5 * deviation
    for dimension in range(3):  # nor does any token, sample or channel drop more than its share
        others = [other for other in range(3) if other != dimension]
        means = 1 - mask.double().mean(dim=others)
        assert (means - share).abs().max() < 6 * deviation * mask.shape[dimension] ** 0.5


def test_masks_of_other_places_are_independent() -> None:
    """Half the elements of two masks agree, whatever it is in which they differ."""
    first = kept(KEYS, channels=64, stream=3, share=0.5)
    others = {
        "stream": kept(KEYS, channels=64, stream=4, share=0.5),
        "seed": kept(token_keys(8, torch.arange(64), torch.arange(128)), channels=64, stream=3, share=0.5),
        "sample": kept(token_keys(7, torch.arange(1, 65), torch.arange(128)), channels=64, stream=3, share=0.5),
        "place": first.roll(1, dims=0),
        "neighbour": first.roll(1, dims=1),
        "channel": first.roll(1, dims=2),
    }
    for name, other in others.items():
        assert abs((first == other).double().mean().item() - 0.5) < 0.005, name


def test_a_part_of_the_tokens_has_its_part_of_the_mask() -> None:
    """What makes the masks the same in every layout."""
    part = token_keys(7, torch.arange(10, 20), torch.arange(32, 64))
    whole = kept(KEYS, channels=64, stream=5, share=0.3)
    assert torch.equal(kept(part, channels=64, stream=5, share=0.3), whole[32:64, 10:20])


def test_what_stays_is_scaled_up() -> None:
    hidden = torch.ones(128, 64, 64, dtype=torch.float64)
    found = drop(hidden, KEYS, stream=1, share=0.2)
    assert set(found.unique().tolist()) == {0.0, 1.25}
    assert abs(found.mean().item() - 1) < 0.01


def test_evaluation_drops_nothing() -> None:
    residual = Residual(stream=2, share=0.5, sequence_parallel=False)
    residual.tokens = LayerContext(rotation=None, pieces=None, dropout_keys=KEYS, weights=None, loss_factor=None)
    change, stream = torch.randn(128, 64, 8), torch.randn(128, 64, 8)
    bias = torch.randn(8)
    torch.testing.assert_close(residual(False, False)((change, bias), stream, 0.5), stream + change + bias)
    trained = residual(True, False)((change, bias), stream, 0.5) - stream
    torch.testing.assert_close(trained, drop(change + bias, KEYS, stream=2, share=0.5))
    assert (trained == 0).any()
