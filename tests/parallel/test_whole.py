"""Optimizers that step whole parameters: equal to torch's own, equal to one rank in every layout, and resharded."""

from dataclasses import replace
from typing import Any

import bitsandbytes
import pytest
import torch

from launcher.explain.measured import bytes_held
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.proof import compared
from launcher.verify.world import run_world
from model.config import MoeConfig
from parallel.common.errors import ConfigError
from parallel.config import GroupConfig, MuonConfig, MuonScale, OptimizerConfig
from parallel.eight_bit import AdamW8bit
from parallel.muon import Muon
from parallel.rules import check_patterns
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth, pytest.mark.slow]

MOE = MoeConfig(experts=4, ffn_hidden_size=32, shared_ffn_hidden_size=16, load_balance_loss=0.1)


def stepped_by(name: str, case: Case, **changes: Any) -> Case:
    optimizer = replace(case.config.optimizer, name=name, **changes)
    return replace(case, config=replace(case.config, optimizer=optimizer))


def with_model(case: Case, **changes: Any) -> Case:
    return replace(case, config=replace(case.config, model=replace(case.config.model, **changes)))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", list(MuonScale))
def test_muon_is_torchs(shape: tuple[int, int], nesterov: bool, scale: MuonScale) -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    groups = [{"params": [ours], "lr": 0.02, "weight_decay": 0.1}]
    muon = Muon(groups, config=MuonConfig(nesterov=nesterov, scale=scale), precision=torch.bfloat16)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=scale.value, momentum=0.95
    )
    for _ in range(5):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step()
        reference.step()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(300, 65), (64, 64)])
def test_8_bit_adamw_is_bitsandbytes_and_near_torchs(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(shape, generator=generator)
    ours, theirs, exact = (torch.nn.Parameter(first.clone()) for _ in range(3))
    config = OptimizerConfig(name="adamw_8bit", learning_rate=1e-2)
    numbers: dict[str, Any] = {"lr": 1e-2, "betas": config.betas, "eps": config.eps, "weight_decay": 0.1}
    optimizers = [
        AdamW8bit([{"params": [ours], "lr": 1e-2, "weight_decay": 0.1}], config=config),
        bitsandbytes.optim.AdamW8bit([theirs], **numbers),
        torch.optim.AdamW([exact], **numbers),
    ]
    for _ in range(30):
        gradient = 0.1 * torch.randn(shape, generator=generator) + 0.05
        for parameter, optimizer in zip((ours, theirs, exact), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(ours, theirs)
    way = (exact - first).norm()
    assert 0 < (ours - exact).norm() < 0.02 * way


def test_an_update_of_muon_is_orthogonal() -> None:
    matrix = torch.nn.Parameter(torch.zeros(24, 40))
    matrix.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    Muon([{"params": [matrix], "lr": 1.0}], config=MuonConfig(scale=MuonScale.original)).step()
    values = torch.linalg.svdvals(matrix.detach())
    assert values.min() > 0.6
    assert values.max() < 1.3


PROOFS: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "dp3-fp32": (3, torch.float32, {}),
    "dp2-stage0-fp64": (2, torch.float64, {"zero_stage": 0}),
    "tp2-bf16": (2, torch.bfloat16, {"tensor": 2}),
    "tp2-dp2-fp64": (4, torch.float64, {"tensor": 2}),
    "pp2-vpp2-tied-fp64": (2, torch.float64, {"pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.mark.parametrize(
    ("name", "proof"),
    [
        *(("muon", proof) for proof in PROOFS),
        *(("adafactor", proof) for proof in ("dp3-fp32", "pp2-vpp2-tied-fp64")),
        *(
            pytest.param("adafactor", proof, marks=pytest.mark.long)
            for proof in ("dp2-stage0-fp64", "tp2-bf16", "tp2-dp2-fp64")
        ),
        ("adamw_8bit", "tp2-bf16"),
        pytest.param("adamw_8bit", "tp2-dp2-fp64", marks=pytest.mark.long),
    ],
)
def test_a_layout_equals_one_rank(proof: str, name: str) -> None:
    """Loss, every gradient, the norm, and after three updates every weight and every state, parameter by parameter."""
    ranks, dtype, options = PROOFS[proof]
    layers = 2 * options.get("pipeline", 1)
    case = stepped_by(name, tiny(ranks, dtype=dtype, tied="pipeline" in options, layers=layers, **options))
    case = replace(case, config=replace(case.config, train=replace(case.config.train, global_batch_size=4 * ranks)))
    if name == "adamw_8bit":
        case = with_model(case, hidden_size=64)  # matrices of 4096 elements and more
    found = compared(case, seconds=180)
    assert found.passed, found.crash or [check for check in found.checks if not check.passed]
    checked = {check.what for check in found.checks}
    wanted = {"muon": {"momentum_buffer", "first moments"}, "adafactor": {"row_var", "col_var", "variance"}}
    wanted["adamw_8bit"] = {"exp_avg_code", "exp_avg_sq_scale", "first moments"}
    assert wanted[name] <= checked


def test_experts_are_stepped_whole_too() -> None:
    case = with_model(tiny(4, tensor=2, expert=2, dtype=torch.float64, layers=2), moe=MOE)
    found = compared(stepped_by("muon", case), seconds=180)
    assert found.passed, found.crash or [check for check in found.checks if not check.passed]
    assert any("momentum_buffer" in check.what for check in found.checks)


@pytest.mark.parametrize(
    ("ranks", "name", "dtype", "moe", "layout"),
    [
        (3, "adafactor", torch.bfloat16, False, {}),
        (2, "muon", torch.float32, False, {"zero_stage": 0, "tensor": 2}),
        (4, "muon", torch.bfloat16, True, {"tensor": 2, "expert": 2}),
        (2, "adamw_8bit", torch.bfloat16, False, {"tensor": 2}),
    ],
)
def test_computed_bytes_are_held(ranks: int, name: str, dtype: torch.dtype, moe: bool, layout: dict[str, Any]) -> None:
    case = with_model(tiny(ranks, layers=2, **layout), **({"moe": MOE} if moe else {}))
    case = replace(case, config=replace(case.config, train=replace(case.config.train, global_batch_size=12)))
    if name == "adamw_8bit":
        case = with_model(case, hidden_size=64)
    for (rank,) in bytes_held(stepped_by(name, case, frozen=["layers.0.*weight"]), dtype):
        assert rank.computed == rank.measured


def moved(case: Case) -> tuple[set[str], set[str], set[str]]:
    """Names of all weights, of those that two steps moved, and of those that the optimizer keeps something of."""
    engine = engine_of(case)
    before = {name: piece.data.clone() for name, piece in engine.participants()["model"].state_dict().items()}
    for step in range(2):
        engine.step(batch_of(case, step, engine.topology))
    after = engine.participants()["model"].state_dict()
    kept = {piece.key.partition(".")[2] for piece in engine.participants()["optimizer"].state_dict().values()}
    changed = {after[name].key for name, data in before.items() if not torch.equal(after[name].data, data)}
    return (
        {piece.key.removeprefix("weight.") for piece in after.values()},
        {name.removeprefix("weight.") for name in changed},
        kept,
    )


FREEZING: dict[str, tuple[int, str, dict[str, Any]]] = {
    "zero0": (1, "adamw", {"zero_stage": 0}),
    "zero1-pp2": (2, "adamw", {"pipeline": 2}),
    "zero2-bf16": (2, "adamw", {"zero_stage": 2}),
    "zero3-bf16": (2, "adamw", {"zero_stage": 3}),
    "muon-tp2": (2, "muon", {"tensor": 2}),
}


@pytest.mark.parametrize("name", list(FREEZING))
def test_frozen_parameters_stand_still_and_cost_nothing(name: str) -> None:
    ranks, optimizer, layout = FREEZING[name]
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    case = stepped_by(
        optimizer, tiny(ranks, dtype=dtype, **layout), frozen=["embedding", r"layers\.[13]\."], average_decay=0.9
    )
    answers = run_world(moved, ranks, case)
    names, changed, kept = (set().union(*(answer[number] for answer in answers)) for number in range(3))
    frozen = {each for each in names if "embedding" in each or "layers.1." in each or "layers.3." in each}
    assert len(frozen) == 1 + 2 * 6
    assert changed == kept == names - frozen
    for (rank,) in bytes_held(case, dtype):
        assert rank.computed == rank.measured


def test_a_frozen_model_trains_as_on_one_rank() -> None:
    case = stepped_by("adamw", tiny(4, dtype=torch.float64, zero_stage=0, tensor=2, pipeline=2), frozen=["layers.[02]"])
    found = compared(case, seconds=180)
    assert found.passed, found.crash or [check for check in found.checks if not check.passed]


def updates(optimizer: OptimizerConfig, zero_stage: int) -> dict[str, torch.Tensor]:
    """How far one step moves each weight, clipping aside."""
    case = tiny(zero_stage=zero_stage)
    case = replace(case, config=replace(case.config, optimizer=optimizer))

    def work() -> dict[str, torch.Tensor]:
        engine = engine_of(case)
        before = {piece.key: piece.data.clone() for piece in engine.participants()["model"].state_dict().values()}
        engine.step(batch_of(case, 0, engine.topology))
        after = engine.participants()["model"].state_dict().values()
        return {piece.key.removeprefix("weight."): piece.data - before[piece.key] for piece in after}

    return run_world(work, 1)[0]


@pytest.mark.parametrize(("name", "zero_stage"), [("adamw", 0), ("adamw", 1), ("muon", 1)])
def test_groups_have_their_own_rate_and_decay(name: str, zero_stage: int) -> None:
    plain = replace(tiny().config.optimizer, name=name, weight_decay=0.0)
    groups = [
        GroupConfig(pattern="linear_qkv", learning_rate_factor=0.5),
        GroupConfig(pattern="linear_", weight_decay=0.25),
    ]
    expected, found = updates(plain, zero_stage), updates(replace(plain, groups=groups), zero_stage)
    decayed, slowed = 0, 0
    for key, update in expected.items():
        if "linear_qkv" in key:
            torch.testing.assert_close(found[key], 0.5 * update, rtol=1e-4, atol=2e-8)
            slowed += 1
        elif "linear_" in key:
            decay = (found[key] - update) / plain.learning_rate
            assert decay.abs().max() > 0.01
            decayed += 1
        else:
            assert torch.equal(found[key], update)
    assert (slowed, decayed) == (4, 12)


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    optimizer = OptimizerConfig(frozen=["embeding"], groups=[GroupConfig(pattern="linear_qvk")])
    with pytest.raises(ConfigError) as refused:
        check_patterns(["embedding.weight", "decoder.layers.0.linear_qkv.weight"], optimizer)
    assert "optimizer.frozen is 'embeding'" in str(refused.value)
    assert "optimizer.groups.0.pattern is 'linear_qvk'" in str(refused.value)


def test_a_stage_with_nothing_to_train_is_refused() -> None:
    case = stepped_by("adamw", tiny(2, pipeline=2), frozen=["embedding", r"layers\.[01]\."])
    with pytest.raises(ConfigError, match="leave every pipeline stage something to train"):
        run_world(lambda: engine_of(case), 2)
