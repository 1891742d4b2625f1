"""Objectives against sums written out in the open, on one rank and with the vocabulary cut over two."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.verify.world import run_world
from model.objectives import Prediction

pytestmark = pytest.mark.distributed

SEQUENCE, BATCH, VOCABULARY, Z_LOSS = 5, 2, 12, 0.3


def example() -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [sequence, batch, vocabulary] in float64, and what goes with them."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(SEQUENCE, BATCH, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    weights = torch.rand(BATCH, SEQUENCE, generator=generator)
    weights[0, 1] = 0
    return logits, {"labels": labels, "loss_weights": weights}


def on_ranks() -> tuple[float, float, Tensor]:
    """The loss, the z-loss that is reported, and the gradient of the whole logits."""
    logits, batch = example()
    group = dist.group.WORLD
    assert group is not None
    ours = logits.chunk(group.size(), dim=-1)[group.rank()].clone().requires_grad_()
    loss, weight, reported = Prediction(z_loss=Z_LOSS)(ours, batch, group)
    loss.backward()
    assert ours.grad is not None
    parts = [torch.empty_like(ours.grad) for _ in range(group.size())]
    dist.all_gather(parts, ours.grad, group=group)
    total, count = reported["z_loss"].tolist()
    assert count == weight == batch["loss_weights"].sum()
    return float(loss.detach()), total, torch.cat(parts, dim=-1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_z_loss_by_hand(ranks: int) -> None:
    logits, batch = example()
    logits.requires_grad_()
    probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    labels, weights = batch["labels"].T, batch["loss_weights"].T
    losses = -probabilities.gather(-1, labels[..., None])[..., 0].log()
    squares = (logits.exp().sum(dim=-1).log().square() * weights).sum()
    expected = (losses * weights).sum() + Z_LOSS * squares
    expected.backward()
    for loss, reported, gradient in run_world(on_ranks, ranks):
        assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
        assert reported == pytest.approx(float(squares.detach()), rel=1e-12)
        torch.testing.assert_close(gradient, logits.grad, rtol=1e-12, atol=1e-14)


def test_an_evaluation_has_no_z_loss() -> None:
    def both() -> tuple[float, float]:
        logits, batch = example()
        with torch.no_grad():
            return tuple(float(Prediction(z_loss=z)(logits, batch, dist.group.WORLD)[0]) for z in (0.0, Z_LOSS))

    ((plain, with_z),) = run_world(both, 1)
    assert plain == with_z
