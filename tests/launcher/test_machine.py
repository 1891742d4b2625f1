"""What a CPU is measured to reach, put into the planner's arithmetic, is what a step takes there."""

import time
from dataclasses import replace
from typing import Any

import pytest

from launcher import config as configuration
from launcher.machine import measured_cpu
from launcher.plan.facts import Facts
from launcher.plan.seconds import step_seconds
from launcher.prediction import setting_of
from launcher.verify.batches import Traits
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from model.config import Activation, LoraConfig, Norm, Position
from tests.launcher.tiny import ROOT

GPT2 = {"norm": Norm.layer, "activation": Activation.gelu, "position": Position.learned, "linear_bias": True}


def both(case: Case) -> tuple[float, float]:
    """Seconds of this processor: predicted and, the least of some, taken."""
    config, vocabulary = case.config, case.config.model.vocabulary_size
    assert vocabulary is not None
    engine = engine_of(case)
    batch = batch_of(case, 0, engine.topology)
    taken = []
    for _ in range(4):
        started = time.process_time()
        engine.step(batch)
        taken.append(time.process_time() - started)
    facts = Facts.of(config.model, vocabulary_size=vocabulary, sequence_length=config.train.sequence_length)
    machine = measured_cpu(config, facts, engine.topology, clock=time.process_time)
    return sum(step_seconds(setting_of(config, facts, engine.topology, machine)).values()), min(taken)


@pytest.mark.distributed
@pytest.mark.truth
@pytest.mark.parametrize(
    "model",
    [{}, {**GPT2, "layers": 6, "hidden_size": 192, "heads": 6, "kv_heads": 6}, {"lora": LoraConfig(rank=8)}],
    ids=["quickstart", "gpt2", "adapters"],
)
def test_a_step_takes_what_is_predicted(model: dict[str, Any]) -> None:
    """In the processor's own time, since nobody else's use of it is at issue."""
    config = configuration.load([ROOT / "configs" / "quickstart.yaml"])
    config = replace(
        config,
        model=replace(config.model, vocabulary_size=8192, **model),
        train=replace(config.train, global_batch_size=4),
    )
    case = Case(config=config, ranks=1, traits=Traits(packed=True))
    ((predicted, taken),) = run_world(lambda: both(case), 1)
    assert predicted == pytest.approx(taken, rel=0.2)
