"""`bloomery explain`: what it says is what runs, and what it computes is what is held."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher.explain.collectives import When, collectives
from launcher.explain.sizes import sizes, stage_sizes
from launcher.verify.measure import Case, engine_of
from launcher.verify.world import run_world
from model.config import MoeConfig
from parallel.mechanism import Reduction, mechanism
from parallel.memory import Size
from tests.distributed.layouts import VOCABULARY, tiny
from tests.launcher.tiny import configuration, run

pytestmark = pytest.mark.distributed

MOE = MoeConfig(experts=4, ffn_hidden_size=32, shared_ffn_hidden_size=16, first_layer=1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return configuration(tmp_path, tmp_path / "no-store", model={"layers": 4, "vocabulary_size": 256})


def explained(config: Path, *arguments: str) -> tuple[int, str, dict[str, Any]]:
    file = config.parent / "explained.json"
    codes, said = run("explain", config, *arguments, "--json", file)
    return codes[0], said, json.loads(file.read_text()) if file.exists() else {}


@pytest.mark.long
@pytest.mark.truth
def test_every_row_holds_what_was_computed(config: Path) -> None:
    code, said, found = explained(config, "parallel.zero_stage=2", "train.global_batch_size=8", "--ranks", "4")
    assert code == 0
    assert "4 ranks: data 4, ZeRO stage 2; fp32" in said
    assert "\x1b" not in said
    (own,) = (row for row in found["rows"] if row["yours"])
    assert (own["pipeline"], own["zero_stage"]) == (1, 2)
    assert own["gradients_reduced"] == Reduction.in_every_backward
    legal = [row for row in found["rows"] if row["refused"] is None]
    assert [(row["pipeline"], row["virtual_pipeline"], row["zero_stage"]) for row in legal] == [
        (1, 1, 0), (1, 1, 1), (1, 1, 2), (1, 1, 3), (2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 2, 0), (2, 2, 1),
    ]  # fmt: skip
    for row in legal:
        assert [one["precision"] for one in row["measured"]] == ["fp32", "bf16"]
        assert all(one["computed"] == one["measured"] and one["measured"]["moments"] for one in row["measured"])
    assert found["own"]["computed"] == found["own"]["measured"]
    assert {call["over"] for call in found["collectives"]} == {"data"}


def test_an_illegal_row_says_why(config: Path) -> None:
    code, said, found = explained(config, "model.layers=3", "parallel.offload=true", "--no-measure")
    assert code == 0
    refused = {
        (row["pipeline"], row["virtual_pipeline"], row["zero_stage"]): row["refused"]
        for row in found["rows"]
        if row["refused"]
    }
    assert "expected false at ZeRO stage 0" in refused[1, 1, 0]
    assert "a multiple of pipeline x virtual_pipeline = 2, such as 2" in refused[2, 1, 1]
    assert set(found["rows"][1]["bytes"]["bf16"]) >= {"weights", "host_masters", "host_moments"}
    assert found["own"] is found["collectives"] is None
    assert "device + host" in said


def test_an_illegal_layout_is_refused(config: Path) -> None:
    code, said, _ = explained(config, "parallel.pipeline=3", "parallel.zero_stage=3", "--ranks", "3")
    assert code == 2
    assert "parallel.zero_stage is 3" in said
    assert "model.layers is 4" in said


def with_model(case: Case, **changes: Any) -> Case:
    return replace(case, config=replace(case.config, model=replace(case.config.model, **changes)))


def of_the_engine(case: Case) -> tuple[int, list[Size]]:
    engine = engine_of(case)
    return engine.topology.pipeline_rank, sizes(engine.parameters, case.config.optimizer)


def without_memory(case: Case) -> list[list[Size]]:
    dist.destroy_process_group()
    config = case.config
    return stage_sizes(config.model, config.parallel, vocabulary_size=VOCABULARY, optimizer=config.optimizer)


@pytest.mark.truth
@pytest.mark.parametrize(
    "case",
    [
        tiny(4, tied=True, tensor=2, pipeline=2, pipeline_split=[3, 1]),
        tiny(2, pipeline=2, virtual_pipeline=2),
        with_model(tiny(4, pipeline=2, expert=2), moe=MOE, qk_norm=True),
        with_model(tiny(2, context=2), linear_bias=True, head_size=6),
    ],
    ids=["tp2-pp2-tied", "pp2-vpp2", "pp2-ep2", "cp2-biases"],
)
def test_a_model_without_memory_has_the_parameters_of_one_with(case: Case) -> None:
    (stages,) = run_world(without_memory, 1, case)
    for stage, found in run_world(of_the_engine, case.ranks, case):
        assert stages[stage] == found


WHEN = {
    Reduction.at_the_end: {When.reduction},
    Reduction.in_last_backward: {When.last},
    Reduction.in_every_backward: {When.before, When.last},
}


@pytest.mark.truth
@pytest.mark.parametrize(
    "case",
    [
        tiny(2, zero_stage=0),
        tiny(2, zero_stage=1),
        tiny(2, zero_stage=2),
        tiny(2, zero_stage=3),
        tiny(4, zero_stage=1, pipeline=2),
        tiny(4, zero_stage=2, pipeline=2, tied=True),
        tiny(4, zero_stage=1, pipeline=2, virtual_pipeline=2),
    ],
    ids=["zero0", "zero1", "zero2", "zero3", "pp2", "pp2-tied-zero2", "pp2-vpp2"],
)
def test_gradients_are_reduced_when_it_says_so(case: Case) -> None:
    how = mechanism(case.config.parallel, tied=case.config.model.tie_embeddings, sharers=2)
    calls = collectives(case)
    reductions = [call for call in calls if call.over == "data" and call.name in ("all-reduce", "reduce-scatter")]
    assert {call.when for call in reductions} == WHEN[how.reduction]
    sums = Counter({call.when: call.bytes for call in reductions})
    micro_batches = 2 if how.reduction is Reduction.in_every_backward else 1
    gathered = [call.bytes for call in calls if call.when is When.update and call.name == "all-gather"]
    weights = gathered[0] if gathered else sums.total() / micro_batches
    assert sums.total() == pytest.approx(micro_batches * weights, rel=0.01)
