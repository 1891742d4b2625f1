"""The router's losses against loops over tokens, and what a step reports of it in any layout."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from model.build import transformer_config
from model.config import MoeConfig, RouterScore
from model.layer_context import LayerContext
from model.moe import Router
from parallel.topology import Topology
from tests.distributed.layouts import MODEL, tiny

pytestmark = [pytest.mark.truth, pytest.mark.distributed]

MOE = MoeConfig(experts=4, top_k=2, ffn_hidden_size=32, load_balance_loss=0.1, z_loss=0.01)


def mixture(ranks: int = 1, *, moe: MoeConfig = MOE, **layout: Any) -> Case:
    case = tiny(ranks, dtype=torch.float64, zero_stage=0, **layout)
    return replace(case, config=replace(case.config, model=replace(MODEL, moe=moe)))


def router(moe: MoeConfig) -> Router:
    case = mixture(moe=moe)
    topology = Topology.create(case.config.parallel)
    config = transformer_config(case.config.model, dtype=torch.float64, topology=topology)
    made = Router(config=config, description=moe, pg_collection=topology.groups)
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(1))
    return made


def told(made: Router, weights: Tensor, factor: float = 1.0) -> None:
    made.tokens = LayerContext(
        rotation=None, pieces=None, dropout_keys=None, weights=weights, loss_factor=torch.tensor(factor)
    )


HIDDEN = torch.randn(6, 3, MODEL.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
WEIGHTS = (torch.rand(6, 3, generator=torch.Generator().manual_seed(3)) < 0.7).float() * 0.5


def losses_by_loops(made: Router) -> tuple[float, float]:
    """Load balancing and z-loss as the module's docstring defines them, token by token."""
    balance = z = 0.0
    for sample in range(3):
        total = float(WEIGHTS[:, sample].sum())
        shares, scores = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for place in range(6):
            weight = float(WEIGHTS[place, sample])
            logits = made.weight.detach() @ HIDDEN[place, sample]
            for expert in logits.topk(MOE.top_k).indices:
                shares[expert] += weight / (total * MOE.top_k)
            scores += logits.softmax(dim=0) * weight / total
            z += weight * float(logits.logsumexp(dim=0)) ** 2
        balance += total * 4 * float(shares @ scores)
    return balance, z


def routed() -> dict[str, Any]:
    made = router(MOE)
    told(made, WEIGHTS)
    weights, choice = made(HIDDEN)
    assert made.sums is not None
    return {
        "sums": made.sums,
        "expected": losses_by_loops(made),
        "tokens": (choice.view(6, 3, 4) * WEIGHTS[..., None]).sum(dim=(0, 1)),
        "weights": weights.detach(),
        "choice": choice,
    }


def test_the_losses_are_those_of_the_definition() -> None:
    (found,) = run_world(routed, 1)
    balance, z = found["expected"]
    assert found["sums"][-2].item() == pytest.approx(balance, rel=1e-12)
    assert found["sums"][-1].item() == pytest.approx(z, rel=1e-12)
    torch.testing.assert_close(found["sums"][:-2], found["tokens"].double())
    assert (found["choice"].sum(dim=1) == MOE.top_k).all()
    assert ((found["weights"] > 0) == found["choice"]).all()
    torch.testing.assert_close(found["weights"].sum(dim=1), torch.ones(18, dtype=torch.float64))


def gradients() -> tuple[Tensor, Tensor]:
    """Of the router's weight: with the losses attached at a factor of 3 and a main loss of zero; by differences."""
    made = router(MOE)
    told(made, WEIGHTS, factor=3.0)
    weights, _ = made(HIDDEN)
    (weights * 0).sum().backward()

    def total(weight: Tensor) -> float:
        made.weight.data = weight
        balance, z = losses_by_loops(made)
        return 3 * (MOE.load_balance_loss * balance + MOE.z_loss * z)

    start, by_differences = made.weight.detach().clone(), torch.zeros(4, 3, dtype=torch.float64)
    for expert in range(4):
        for channel in range(3):
            change = torch.zeros_like(start)
            change[expert, channel] = 1e-6
            by_differences[expert, channel] = (total(start + change) - total(start - change)) / 2e-6
    assert made.weight.grad is not None
    return made.weight.grad[:, :3], by_differences


def test_their_gradient_reaches_the_router_once() -> None:
    ((found, by_differences),) = run_world(gradients, 1)
    torch.testing.assert_close(found, by_differences, rtol=1e-6, atol=1e-8)


def choices_not_normalised() -> tuple[Tensor, Tensor]:
    made = router(replace(MOE, normalise_top_k=False))
    told(made, WEIGHTS)
    weights, choice = made(HIDDEN)
    scores = torch.einsum("sbh,eh->sbe", HIDDEN, made.weight).softmax(dim=-1).flatten(0, 1)
    return weights.detach(), (scores * choice).detach()


def test_weights_may_stay_what_the_softmax_over_all_experts_gave() -> None:
    ((found, expected),) = run_world(choices_not_normalised, 1)
    torch.testing.assert_close(found, expected)


SIGMOID = replace(
    MOE, score=RouterScore.sigmoid, scale=1.5, groups=2, top_groups=1, group_experts=2, expert_bias=True, bias_loss=0.25
)
BIAS = torch.tensor([0.3, -0.4, 0.1, 0.2], dtype=torch.float64)


def routed_with_a_bias() -> dict[str, Tensor]:
    made = router(SIGMOID)
    assert made.bias is not None
    made.bias.data.copy_(BIAS)
    told(made, WEIGHTS, factor=3.0)
    weights, choice = made(HIDDEN)
    (weights * 0).sum().backward()
    assert made.bias.grad is not None
    scores = torch.einsum("sbh,eh->sbe", HIDDEN, made.weight.detach()).sigmoid().flatten(0, 1)
    return {"weights": weights.detach(), "choice": choice, "scores": scores, "gradient": made.bias.grad}


def test_a_bias_has_a_say_in_the_choice_alone_and_its_gradient_is_the_load() -> None:
    (found,) = run_world(routed_with_a_bias, 1)
    differs = 0
    for token, scores in enumerate(found["scores"]):
        better = max((0, 2), key=lambda first, s=scores: float((s + BIAS)[first : first + 2].sum()))
        chosen = {better, better + 1}  # two experts of the better half
        assert set(found["choice"][token].nonzero().flatten().tolist()) == chosen
        expected = 1.5 * scores / scores[sorted(chosen)].sum()
        for expert in range(4):
            given = float(expected[expert]) if expert in chosen else 0.0
            assert float(found["weights"][token, expert]) == pytest.approx(given, rel=1e-12)
        differs += set(scores.topk(2).indices.tolist()) != chosen
    assert differs, "the plain choice would have been the same"
    load = torch.einsum("te,t->e", found["choice"].double() * (4 / 2) - 1, WEIGHTS.flatten().double())
    torch.testing.assert_close(found["gradient"], 3 * 0.25 * load)
    assert load.abs().max() > 0


def metrics(case: Case) -> dict[str, float]:
    engine = engine_of(case)
    found = engine.step(batch_of(case, 1, engine.topology)).metrics
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, {"expert": 2}), (2, {"pipeline": 2}), (4, {"tensor": 2, "context": 2}), (2, {"micro_batch_size": 4})],
    ids=["ep2", "pp2", "tp2-cp2", "dp2-mbs4"],
)
def test_what_a_step_reports_does_not_depend_on_the_layout(ranks: int, layout: dict[str, int]) -> None:
    moe = replace(MOE, first_layer=1)
    (expected,) = run_world(metrics, 1, mixture(moe=moe))
    assert 1 <= expected["busiest_expert"] <= MOE.experts
    assert expected["load_balance_loss"] > 0.9
    for found in run_world(metrics, ranks, mixture(ranks, moe=moe, **layout)):
        assert found == pytest.approx(expected, rel=1e-12)


def test_a_dense_model_reports_nothing_of_routers() -> None:
    assert run_world(metrics, 1, tiny(zero_stage=0)) == [{}]
