"""Objectives against sums written out in the open, on one rank and with the vocabulary cut over two; and the losses of
sources in every kind of layout."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.assemble import make_engine
from launcher.objective import objective_of
from launcher.verify.batches import Traits, slice_of, synthetic_batch
from launcher.verify.measure import Case
from launcher.verify.world import run_world
from model.objectives import Prediction
from parallel.engine import Engine
from parallel.topology import Topology
from tests.distributed.layouts import tiny

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


SOURCES = ("code", "prose", "never")


def engine_of(case: Case, *sources: str) -> Engine:
    vocabulary = case.config.model.vocabulary_size
    assert vocabulary is not None
    return make_engine(
        case.config,
        vocabulary_size=vocabulary,
        topology=Topology.create(case.config.parallel),
        objective=objective_of(case.config, sources=sources),
        dtype=case.dtype,
    )


def of_two_sources(case: Case) -> dict[str, Tensor]:
    batch = synthetic_batch(case.config, 1, Traits(unequal=True))
    return {**batch, "source": (batch["sample_ids"] % 3 > 0).long()}


def one_after_the_other(case: Case) -> dict[str, list[float]]:
    """The loss and the weight of each source by a batch in which nothing else counts."""
    engine, batch = engine_of(case), of_two_sources(case)
    found = {}
    for number, name in enumerate(SOURCES[:2]):
        own = (batch["source"] == number)[:, None]
        result = engine.evaluate({**batch, "loss_weights": batch["loss_weights"] * own})
        found[f"loss_by_source.{name}"] = [float(result.loss * result.weight), float(result.weight)]
    return found


def by_source(case: Case) -> tuple[float, dict[str, list[float]]]:
    engine = engine_of(case, *SOURCES)
    result = engine.step(slice_of(of_two_sources(case), engine.topology))
    return float(result.loss * result.weight), {name: pair.tolist() for name, pair in result.reported.items()}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, {}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"tensor": 2, "context": 2}),
        (2, {"micro_batch_size": 4}),
    ],
    ids=["one", "pp2-vpp2", "tp2-cp2", "dp2-mbs4"],
)
def test_losses_of_sources_do_not_depend_on_the_layout(ranks: int, layout: dict[str, Any]) -> None:
    (expected,) = run_world(one_after_the_other, 1, tiny(dtype=torch.float64, zero_stage=0))
    for total, found in run_world(by_source, ranks, tiny(ranks, dtype=torch.float64, zero_stage=0, **layout)):
        assert found.pop("loss_by_source.never") == [0, 0]
        assert found.keys() == expected.keys()
        for name, pair in expected.items():
            assert found[name] == pytest.approx(pair, rel=1e-12)
        assert sum(loss for loss, _ in found.values()) == pytest.approx(total, rel=1e-12)
