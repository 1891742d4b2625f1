"""The average of the weights, against one made by hand from the weights of every step, in every way to hold them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from launcher.explain.measured import bytes_held
from launcher.verify.compare import whole
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from tests.distributed.layouts import tiny

pytestmark = pytest.mark.distributed

DECAY, STEPS = 0.6, 4
Held = list[tuple[Any, np.ndarray]]

CASES: dict[str, tuple[int, str, torch.dtype, dict[str, Any]]] = {
    "alone": (1, "adamw", torch.float32, {"zero_stage": 0}),
    "dp3-zero1": (3, "adamw", torch.float32, {}),
    "dp2-zero3-bf16": (2, "adamw", torch.bfloat16, {"zero_stage": 3}),
    "dp2-zero2-offload": (2, "adamw", torch.float32, {"zero_stage": 2, "offload": True}),
    "tp2-pp2-muon": (4, "muon", torch.bfloat16, {"tensor": 2, "pipeline": 2}),
}


def case_of(name: str) -> Case:
    ranks, optimizer, dtype, layout = CASES[name]
    case = tiny(ranks, dtype=dtype, layers=2 * layout.get("pipeline", 1), **layout)
    own = replace(case.config.optimizer, name=optimizer, average_decay=DECAY, frozen=["layers.1.mlp"])
    train = replace(case.config.train, global_batch_size=12)
    return replace(case, config=replace(case.config, optimizer=own, train=train))


def _held(participant: Any) -> Held:
    return [(piece, piece.data.double().numpy().copy()) for piece in participant.state_dict().values()]


def _followed(case: Case) -> tuple[list[Held], Held]:
    """The weights after each step, and the average after the last."""
    engine = engine_of(case)
    weights = []
    for step in range(STEPS):
        engine.step(batch_of(case, step, engine.topology))
        weights.append(_held(engine.participants()["model"]))
    return weights, _held(engine.participants()["average"])


@pytest.mark.parametrize("name", list(CASES))
def test_it_is_that_of_the_weights_of_every_step(name: str) -> None:
    case = case_of(name)
    answers = run_world(_followed, case.ranks, case)
    found = whole([average for _, average in answers])
    steps = [whole([weights[step] for weights, _ in answers]).tensors for step in range(STEPS)]
    assert not found.copies
    assert {key.removeprefix("average.") for key in found.tensors} == {key.removeprefix("weight.") for key in steps[0]}
    for key, average in found.tensors.items():
        expected = torch.zeros(average.shape)
        for number, weights in enumerate(steps):
            value = torch.from_numpy(weights[key.replace("average.", "weight.")]).float()
            expected = torch.lerp(expected, value, 1 - min(DECAY, number / (number + 1)))
        assert np.array_equal(average, expected.double().numpy()), key


def test_the_first_steps_count_alike() -> None:
    """With a decay near 1 the average of a few steps is their mean."""
    case = case_of("alone")
    own = replace(case.config.optimizer, average_decay=0.999, frozen=[])
    (answer,) = run_world(_followed, 1, replace(case, config=replace(case.config, optimizer=own)))
    steps = [whole([weights]).tensors for weights in answer[0]]
    for key, average in whole([answer[1]]).tensors.items():
        mean = np.mean([weights[key.replace("average.", "weight.")] for weights in steps], axis=0)
        np.testing.assert_allclose(average, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["alone", "dp3-zero1", "dp2-zero2-offload", "tp2-pp2-muon"])
def test_its_bytes_are_computed(name: str) -> None:
    case = case_of(name)
    for (rank,) in bytes_held(case, case.dtype):
        assert rank.computed == rank.measured
        assert rank.measured["averages"]
