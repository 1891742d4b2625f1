"""ZeRO beyond the gradient matrix: experts, offload, fp16, what each rank holds, and in which precision it adds up."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.explain.measured import before_last_micro_batch
from launcher.verify.compare import Tensors, whole, worst
from launcher.verify.measure import Case, batch_of, engine_of, found
from launcher.verify.world import run_world
from model.config import Dispatcher, MoeConfig
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine import Engine
from parallel.fragments import whole_value
from parallel.held import storages
from parallel.optimizer import PlainUpdater
from parallel.parameters import LocalParameter
from parallel.topology import Topology
from parallel.updater import Kind, Updater
from parallel.zero import ZeroUpdater
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth, pytest.mark.slow]

MOE = MoeConfig(experts=4, ffn_hidden_size=32, shared_ffn_hidden_size=16, load_balance_loss=0.1, z_loss=0.01)


def with_model(case: Case, **changes: Any) -> Case:
    return replace(case, config=replace(case.config, model=replace(case.config.model, **changes)))


def first_step(case: Case) -> tuple[float, float, Tensors]:
    """Loss, norm and whole gradients of the first step, and that all ranks agree on them."""
    answers = run_world(lambda: found(case, steps=1), case.ranks)
    assert all(answer.norms == answers[0].norms and answer.losses == answers[0].losses for answer in answers)
    together = whole([answer.gradients[0] for answer in answers])
    assert not together.copies
    return answers[0].losses[0], answers[0].norms[0], together.tensors


_one_rank: dict[str, tuple[float, float, Tensors]] = {}


def equals_one_rank(case: Case, tolerance: float) -> None:
    """The same model and batch on one rank at stage 0."""
    alone = replace(case, ranks=1, config=replace(case.config, parallel=ParallelConfig(zero_stage=0)))
    if repr(alone) not in _one_rank:
        _one_rank[repr(alone)] = first_step(alone)
    (loss, norm, gradients), (its_loss, its_norm, its_gradients) = first_step(case), _one_rank[repr(alone)]
    error, name = worst(gradients, its_gradients)
    assert error <= tolerance, f"gradient of {name}: {error:.1e}"
    assert loss == pytest.approx(its_loss, rel=tolerance)
    assert norm == pytest.approx(its_norm, rel=tolerance)


@pytest.mark.parametrize(
    ("ranks", "stage", "dispatcher", "layout"),
    [
        (2, 2, "allgather", {"expert": 2}),
        (4, 1, "allgather", {"expert": 2, "offload": True}),
        (4, 2, "alltoall", {"expert": 2}),
        (4, 2, "alltoall", {"tensor": 2, "expert": 2}),
        (2, 1, "alltoall", {"pipeline": 2, "virtual_pipeline": 2}),
        (2, 2, "alltoall", {"context": 2, "expert": 2}),
    ],
    ids=[
        "ep2-zero2",
        "ep2-dp2-offload",
        "ep2-dp2-zero2",
        "tp2-ep2-zero2",
        "pp2-vpp2",
        "cp2-ep2-zero2",
    ],
)
def test_experts_equal_one_rank(ranks: int, stage: int, dispatcher: str, layout: dict[str, Any]) -> None:
    case = tiny(ranks, zero_stage=stage, layers=2 * layout.get("pipeline", 1), **layout)
    equals_one_rank(with_model(case, moe=replace(MOE, dispatcher=Dispatcher(dispatcher))), 2e-6)


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (2, True)])
def test_a_pipeline_stage_without_experts_does_not_hold_up_the_others(stage: int, offload: bool) -> None:
    case = tiny(4, zero_stage=stage, offload=offload, pipeline=2, expert=2)
    equals_one_rank(with_model(case, moe=replace(MOE, first_layer=2)), 2e-6)


@pytest.mark.parametrize(
    ("ranks", "stage", "tied", "layout"),
    [
        (2, 1, False, {}),
        (2, 2, False, {}),
        (2, 3, True, {}),
        (2, 1, True, {"pipeline": 2}),
    ],
    ids=["zero1", "zero2", "zero3", "pp2-tied"],
)
def test_a_step_on_the_host_equals_one_on_the_device(
    ranks: int, stage: int, tied: bool, layout: dict[str, Any]
) -> None:
    layers = 2 * layout.get("pipeline", 1)
    equals_one_rank(tiny(ranks, tied=tied, zero_stage=stage, offload=True, layers=layers, **layout), 2e-6)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"zero_stage": 1, "offload": True}),
        (2, {"zero_stage": 2}),
        (2, {"zero_stage": 3}),
        (2, {"zero_stage": 1, "pipeline": 2, "virtual_pipeline": 2}),
    ],
    ids=["zero1-offload", "zero2", "zero3", "pp2-vpp2"],
)
def test_fp16_rounds_as_one_rank_does(ranks: int, layout: dict[str, Any]) -> None:
    layers = 2 * layout.get("pipeline", 1)
    equals_one_rank(tiny(ranks, dtype=torch.float16, layers=layers, **layout), 1e-6)


def test_fp16_gradients_are_those_of_fp32_but_for_roundings() -> None:
    (_, norm, gradients), (_, its_norm, its) = (
        first_step(tiny(dtype=dtype, zero_stage=0, layers=2)) for dtype in (torch.float16, torch.float32)
    )
    assert worst(gradients, its)[0] < 2e-2
    assert norm == pytest.approx(its_norm, rel=1e-3)


@pytest.mark.parametrize(("dtype", "stage"), [(torch.float16, 2), (torch.bfloat16, 3)])
def test_three_ranks_round_as_one_does(dtype: torch.dtype, stage: int) -> None:
    """Three is no power of two: a gradient averaged and scaled back in bf16 would be another one."""
    case = tiny(3, dtype=dtype, zero_stage=stage, micro_batch_size=1, layers=2)
    equals_one_rank(
        replace(case, config=replace(case.config, train=replace(case.config.train, global_batch_size=9))), 1e-6
    )


def weights(engine: Engine) -> Tensor:
    return torch.cat([whole_value(engine.updater, local, Kind.weight).flatten().clone() for local in engine.parameters])


def overflowing(case: Case) -> dict[str, Any]:
    """A step, then one whose scale is far too large, then another."""
    engine = engine_of(case)
    steps = [engine.step(batch_of(case, 0, engine.topology))]
    before = weights(engine)
    engine.updater.loss_scale.value = 2.0**40
    steps.append(engine.step(batch_of(case, 1, engine.topology)))
    after = weights(engine)
    scale_after = engine.updater.loss_scale.value
    engine.updater.loss_scale.value = 2.0**16
    steps.append(engine.step(batch_of(case, 1, engine.topology)))
    return {
        "skipped": [bool(step.refused) for step in steps],
        "norms": [float(step.grad_norm) for step in steps],
        "unchanged": torch.equal(before, after),
        "moved": not torch.equal(after, weights(engine)),
        "scale": scale_after,
        "steps_taken": engine.schedule.steps_taken,
    }


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (1, True), (2, False), (3, False)],
    ids=["zero0", "zero1", "zero1-offload", "zero2", "zero3"],
)  # fmt: skip
def test_a_step_that_overflows_is_skipped_and_counted(stage: int, offload: bool) -> None:
    for told in run_world(overflowing, 2, tiny(2, dtype=torch.float16, zero_stage=stage, offload=offload)):
        assert told["skipped"] == [False, True, False]
        assert told["norms"][0] > 0
        assert not torch.tensor(told["norms"][1]).isfinite()
        assert told["norms"][2] > 0
        assert told["unchanged"]
        assert told["moved"]
        assert told["scale"] == 2.0**39
        assert told["steps_taken"] == 3


def resumed(case: Case) -> tuple[bool, dict[str, Any], dict[str, Any]]:
    """Whether an engine that takes over after a skipped step goes on with the same bits."""
    first, second = engine_of(case), engine_of(case)
    for step, scale in ((0, 2.0**16), (1, 2.0**40), (2, 2.0**15)):
        first.updater.loss_scale.value = scale
        first.step(batch_of(case, step, first.topology))
    for name, participant in first.participants().items():
        state = participant.state_dict()
        if name != "schedule":
            state = {key: shard.data.clone() for key, shard in state.items()}
        second.participants()[name].load_state_dict(state)
    for engine in (first, second):
        engine.step(batch_of(case, 3, engine.topology))
    same = torch.equal(weights(first), weights(second))
    return same, first.updater.loss_scale.state_dict(), second.updater.loss_scale.state_dict()


@pytest.mark.parametrize("stage", [0, 1])
def test_a_run_goes_on_with_the_same_bits_after_skipped_steps(stage: int) -> None:
    for same, first, second in run_world(resumed, 2, tiny(2, dtype=torch.float16, zero_stage=stage)):
        assert same
        assert first == second
        assert first["steps_not_taken"] == 1


class Ladder(torch.nn.Module):
    """Its gradient is the sum of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))

    def forward(self, rung: Tensor) -> Tensor:
        return (self.weight * rung).sum()


def climbed(stage: int, offload: bool) -> tuple[Tensor, float]:
    """The gradient of one large and 255 tiny contributions, each lost if it is added to the large one in bf16."""
    topology = Topology.create(ParallelConfig(zero_stage=stage, offload=offload))
    ladder = Ladder()
    local = LocalParameter(
        parameter=ladder.weight, shape=ladder.weight.shape, shards=(), expert=False,
        cut_over_tensor_ranks=False, tied_copy=False, tied=False,
    )  # fmt: skip
    make: Callable[..., Updater] = ZeroUpdater if stage else PlainUpdater
    updater = make(ladder, [local], config=OptimizerConfig(), topology=topology)
    rungs = torch.tensor([1.0, *[2.0**-9] * 255], dtype=torch.bfloat16)
    with updater.accumulation():
        with updater.all_but_last_micro_batch():
            for rung in rungs[:-1]:
                updater.module(rung).backward()
        updater.module(rungs[-1]).backward()
    gradient = updater.gradient(local).float().clone()
    return gradient, float(updater.step(1e-3)[0])


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)],
    ids=["zero0", "zero1", "zero2", "zero3", "zero1-offload", "zero2-offload", "zero3-offload"],
)  # fmt: skip
def test_bf16_gradients_of_many_micro_batches_add_up_in_fp32(stage: int, offload: bool) -> None:
    total = 2 * (1 + 255 * 2.0**-9)
    for gradient, norm in run_world(climbed, 2, stage, offload):
        torch.testing.assert_close(gradient, torch.full((6, 4), total), rtol=1e-6, atol=0)
        assert norm == pytest.approx(total * 24**0.5, rel=1e-6)


@cache
def holding(ranks: int, dtype: torch.dtype, **layout: Any) -> list[dict[str, Mapping[str, int]]]:
    """For each rank: what it holds before the last micro-batch, after the reduction and after the step."""
    case = tiny(ranks, dtype=dtype, **layout)

    def look() -> dict[str, Mapping[str, int]]:
        engine = engine_of(case)
        kept = {"between": before_last_micro_batch(engine, case, engine.held)}
        engine.updater.step(1e-3)
        return {**kept, "after": engine.held()}

    return run_world(look, ranks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_stage_holds_a_share_of_what_it_shards(dtype: torch.dtype) -> None:
    """Two ranks; equality but for the padding of a few parameters."""
    whole = {stage: holding(2, dtype, zero_stage=stage)[0]["between"] for stage in (0, 1, 2, 3)}
    parameters = whole[0]["gradients"] // 4
    width = dtype.itemsize
    assert whole[0]["moments"] == 8 * parameters
    assert whole[0]["weights"] == width * parameters
    for stage in (1, 2, 3):
        assert whole[stage]["moments"] == pytest.approx(4 * parameters, rel=0.01)
        assert whole[stage]["masters"] == pytest.approx(2 * parameters, rel=0.01)
    assert whole[1]["gradients"] == 4 * parameters
    assert whole[2]["gradients"] == pytest.approx(2 * parameters, rel=0.01)
    assert whole[3]["gradients"] == pytest.approx(2 * parameters, rel=0.01)
    assert whole[2]["weights"] == pytest.approx(width * parameters, rel=0.01)
    assert whole[3]["weights"] == pytest.approx(width * parameters / 2, rel=0.01)


def live() -> dict[int, int]:
    """Bytes of the storages of all tensors that Python knows, by address."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}


def unaccounted(case: Case) -> int:
    """Bytes of tensors, born with an engine and alive in the middle of a step, that `held` knows nothing of; the least
    of some looks, since a thread of gloo's lets go of what it sent only a moment after it was waited for."""
    before = live()
    engine = engine_of(case)

    def look() -> int:
        kinds = storages(engine.updater.live(), engine.topology.device)
        known = {address for kind in kinds.values() for address in kind}
        looks = []
        for _ in range(5):
            left_out = {address: size for address, size in live().items() if address not in known | before.keys()}
            looks.append(sum(left_out.values()))
            time.sleep(0.02)
        return min(looks)

    return before_last_micro_batch(engine, case, look)


@pytest.mark.parametrize(
    "layout",
    [
        {"zero_stage": 0},
        {"zero_stage": 1},
        {"zero_stage": 1, "offload": True},
        {"zero_stage": 2, "offload": True},
        {"zero_stage": 3, "offload": True},
    ],
    ids=["zero0", "zero1", "zero1-offload", "zero2-offload", "zero3-offload"],
)
def test_what_is_held_leaves_nothing_out(layout: dict[str, Any]) -> None:
    """But the states of random numbers, the table of rotary positions and activations: 30 of 800 KB."""
    for left_out in run_world(unaccounted, 2, tiny(2, dtype=torch.bfloat16, **layout)):
        assert left_out < 30_000
