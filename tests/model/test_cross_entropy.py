"""Cross-entropy in chunks beside that of all logits, in float64: total, what is reported, and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launcher.assemble import make_engine
from launcher.objective import objective_of
from launcher.verify.batches import Traits, slice_of, synthetic_batch
from launcher.verify.measure import Case, engine_of
from launcher.verify.world import run_world
from model import cross_entropy
from model.config import ObjectiveName
from model.cross_entropy import ChunkedCrossEntropy, LogitForm, TokenLosses, weighted_losses
from model.language_model import LanguageModel
from model.objectives import Prediction, objective, takes_losses
from parallel.config import Logits, ParallelConfig
from parallel.topology import Topology
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth]
VOCABULARY, HIDDEN, SEQUENCE, BATCH = 48, 6, 12, 3
Z_LOSS = 1e-2


def example(dtype: torch.dtype, *, weights: str) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    own = torch.rand(BATCH, SEQUENCE, generator=random)
    own = {"all": own, "some": own * (own > 0.6), "none": own * 0}[weights]
    return {
        "hidden": torch.randn(SEQUENCE, BATCH, HIDDEN, generator=random, dtype=torch.float64).to(dtype),
        "matrix": torch.randn(VOCABULARY, HIDDEN, generator=random, dtype=torch.float64).to(dtype),
        "bias": torch.randn(VOCABULARY, generator=random, dtype=torch.float64).to(dtype),
        "labels": torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=random),
        "loss_weights": own,
        "loss_factor": torch.tensor(0.37, dtype=torch.float64),
    }


def found_by(
    how: str, topology: Topology, given: dict[str, torch.Tensor], form: LogitForm, *, biased: bool
) -> list[torch.Tensor]:
    """Total, losses, squares, then the gradients of hidden states, matrix and bias: whole, on every rank."""
    rank, ranks = topology.tensor_rank, topology.config.tensor
    own = [given["matrix"].chunk(ranks)[rank], given["bias"].chunk(ranks)[rank]]
    hidden, matrix, bias = (each.clone().requires_grad_() for each in (given["hidden"], *own))
    if how == "chunked":
        entropy = ChunkedCrossEntropy(topology=topology, z_loss=Z_LOSS)
        sees = hidden.chunk(ranks)[rank] if topology.sequence_parallel else hidden
        found = entropy(sees, matrix, given, form=form, bias=bias if biased else None)
    else:
        logits = form(hidden @ matrix.T) + (bias if biased else 0 * bias)
        found = weighted_losses(logits, given, topology.groups.tp, z_loss=Z_LOSS)
    (found.total * given["loss_factor"].to(found.total.dtype)).backward()
    gradient = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
    if ranks > 1 and (how == "whole" or topology.sequence_parallel):
        dist.all_reduce(gradient)
    others = [torch.zeros_like(each) if each.grad is None else each.grad for each in (matrix, bias)]
    gathered = []
    for each in others:
        parts = [torch.empty_like(each) for _ in range(ranks)]
        dist.all_gather(parts, each)
        gathered.append(torch.cat(parts))
    return [*(each.detach() for each in found), gradient, *gathered]


FORMS = [LogitForm(), LogitForm(factor=0.25), LogitForm(factor=2.0, cap=3.0)]


@pytest.mark.parametrize(
    ("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True)], ids=["1", "tp2", "tp2-sp"]
)
def test_chunks_find_what_all_logits_find(
    monkeypatch: pytest.MonkeyPatch, tensor: int, sequence_parallel: bool
) -> None:
    monkeypatch.setattr(cross_entropy, "logit_rows", lambda *_: 7)  # which divides no number of rows here
    layout = ParallelConfig(tensor=tensor, sequence_parallel=sequence_parallel)

    def errors() -> list[tuple[Any, ...]]:
        rows, topology = [], Topology.create(layout)
        for form in FORMS:
            for weights in ("all", "some", "none"):
                for biased in (False, True):
                    given = example(torch.float64, weights=weights)
                    pair = [found_by(how, topology, given, form, biased=biased) for how in ("whole", "chunked")]
                    for index, (whole, chunked) in enumerate(zip(*pair, strict=True)):
                        error = float((whole - chunked).norm() / whole.norm().clamp(min=1e-30))
                        rows.append((error, float(whole.norm()), (form, weights, biased, index)))
        return rows

    for rows in run_world(errors, tensor):
        assert len(rows) == 3 * 3 * 2 * 6
        assert max(rows, key=lambda row: row[0])[0] < 1e-14
        assert sum(norm > 0 for _, norm, _ in rows) > 60  # or nothing was compared


def test_bf16_is_as_near_to_the_truth_as_with_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "logit_rows", lambda *_: 7)

    def errors() -> list[list[float]]:
        given, topology = example(torch.bfloat16, weights="all"), Topology.create(ParallelConfig())
        exact = {name: each.double() if each.is_floating_point() else each for name, each in given.items()}
        truth = found_by("whole", topology, exact, LogitForm(), biased=True)
        return [
            [
                float((each.double() - true).norm() / true.norm())
                for each, true in zip(found_by(how, topology, given, LogitForm(), biased=True), truth, strict=True)
            ]
            for how in ("whole", "chunked")
        ]

    ((whole, chunked),) = run_world(errors, 1)
    for index in (1, 3, 4, 5):  # the losses and the gradients; sums of some numbers are near by luck
        assert 1e-4 < chunked[index] <= 1.1 * whole[index]


def test_without_gradients_there_is_no_z_loss() -> None:
    def totals() -> list[float]:
        given = example(torch.float64, weights="some")
        topology = Topology.create(ParallelConfig())
        entropies = [ChunkedCrossEntropy(topology=topology, z_loss=z) for z in (0.0, Z_LOSS)]
        own = (given["hidden"], given["matrix"], given)
        return [float(entropy(*own, form=LogitForm(), bias=None).total) for entropy in entropies]

    ((plain, with_z),) = run_world(totals, 1)
    assert plain == with_z > 0


def test_a_frozen_matrix_gets_no_gradient() -> None:
    def gradients() -> tuple[bool, bool]:
        given = example(torch.float32, weights="all")
        entropy = ChunkedCrossEntropy(topology=Topology.create(ParallelConfig()))
        hidden = given["hidden"].requires_grad_()
        entropy(hidden, given["matrix"], given, form=LogitForm(), bias=None).total.backward()
        return hidden.grad is not None, given["matrix"].grad is None

    assert run_world(gradients, 1) == [(True, True)]


def step_of(case: Case) -> tuple[str, float, dict[str, torch.Tensor]]:
    """What the model gave, the loss and the gradients of a step."""
    engine = engine_of(case)
    given: list[str] = []
    loss = engine._loss

    def looked_at(batch: Any, outputs: Any) -> Any:
        first = outputs[0] if type(outputs) is tuple else outputs
        given.append(type(first).__name__)
        return loss(batch, outputs)

    engine._loss = looked_at  # type: ignore[method-assign]
    result = engine.accumulate(slice_of(synthetic_batch(case.config, 1, Traits(unequal=True)), engine.topology))
    gradients = {local.name: engine.updater.gradient(local).clone() for local in engine.parameters}
    assert len(set(given)) == 1
    return given[0], float(result.loss), gradients


def test_engines_with_and_without_all_logits_take_the_same_step() -> None:
    def both() -> list[tuple[str, float, dict[str, torch.Tensor]]]:
        case = tiny(dtype=torch.float64, zero_stage=0)
        parallel = replace(case.config.parallel, logits=Logits.whole)
        return [step_of(each) for each in (case, replace(case, config=replace(case.config, parallel=parallel)))]

    (((kind, loss, gradients), (whole_kind, whole_loss, whole)),) = run_world(both, 1)
    assert (kind, whole_kind) == (TokenLosses.__name__, "Tensor")
    assert loss == pytest.approx(whole_loss, rel=1e-13)
    for name, gradient in whole.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-11, atol=1e-15, msg=name)


def test_a_chunk_that_predicts_in_its_own_way_keeps_all_its_logits() -> None:
    class Divided(LanguageModel):
        def predict(self, hidden: torch.Tensor) -> Any:
            return super().predict(hidden) / 8  # type: ignore[operator]

    def computes() -> list[bool]:
        return [cross_entropy_of(kind) for kind in (LanguageModel, Divided)]

    def cross_entropy_of(kind: type[LanguageModel]) -> bool:
        case = tiny(dtype=torch.float32, zero_stage=0)
        engine = make_engine(
            case.config,
            vocabulary_size=128,
            topology=Topology.create(case.config.parallel),
            objective=objective_of(case.config),
        )
        (chunk,) = engine.updater.module.chunks  # type: ignore[union-attr]
        chunk.cross_entropy = None
        chunk.__class__ = kind
        chunk.predict_in_chunks(z_loss=0.0)
        return chunk.cross_entropy is not None

    assert run_world(computes, 1) == [[True, False]]


def test_an_evaluation_holds_no_logits_unless_they_are_asked_for() -> None:
    class Asked:
        reports = ()

        def __call__(self, outputs: Any, batch: Any, _group: Any) -> Any:
            assert outputs.shape == (*batch["tokens"].T.shape, 256)
            found = weighted_losses(outputs, batch, None)
            return found.total, batch["loss_weights"].sum(), {}

    def losses() -> tuple[float, float, str]:
        case = tiny(dtype=torch.float64, zero_stage=0)
        engine = engine_of(case)
        batch = synthetic_batch(case.config, 1, Traits(unequal=True))
        own = engine.evaluate(batch).loss
        with engine.asked(Asked()):
            other = engine.evaluate(batch).loss
        del batch["loss_weights"]
        return float(own), float(other), type(engine.updater.module(0, batch)).__name__

    ((own, other, kind),) = run_world(losses, 1)
    assert own == pytest.approx(other, rel=1e-13)
    assert kind == "Tensor"


def test_what_an_objective_reads() -> None:
    reading = {name for name in ObjectiveName if takes_losses(objective(name))}
    assert set(ObjectiveName) - reading == {ObjectiveName.classification}

    class Own(Prediction):
        pass

    assert not takes_losses(Own())  # which may look at logits
