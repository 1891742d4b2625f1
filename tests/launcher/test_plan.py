"""The planner: sensible for published models and scales, honest about what it refuses, and without torch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.planner import error, rows
from launcher import cli
from launcher import config as configuration
from launcher.plan.facts import Facts
from launcher.plan.hardware import load, names
from launcher.plan.seconds import stage_elements, trained_elements
from launcher.plan.setting import Setting
from launcher.plan.stages import stage_shapes
from model.config import LoraConfig
from parallel.common.errors import UserError
from parallel.config import OptimizerConfig, ParallelConfig, Precision
from tests.launcher.tiny import ROOT, environment

RUN = ["train.sequence_length=8192", "train.tokens=1T", "model.vocabulary_size=128256"]


def planned(tmp_path: Path, model: str, nodes: int, *more: str, batch: int = 1024) -> dict[str, Any]:
    """The plan of a named model on nodes of eight H100, as `--json` writes it."""
    file = tmp_path / "plan.json"
    name = str(ROOT / "configs" / "model" / f"{model}.yaml")
    words = [name, *RUN, f"train.global_batch_size={batch}", "--nodes", str(nodes), "--hardware", "h100"]
    assert cli.main(["plan", *words, "--json", str(file), *more]) == 0
    return json.loads(file.read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", *words]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "nodes", "layout"),
    [
        # Few ranks share so small a model; published: FSDP alone (torchtitan), context 2 (NeMo).
        ("llama-8b", 1, {"tensor": (1, 2), "pipeline": (1, 1)}),
        ("llama-8b", 16, {"tensor": (1, 2), "pipeline": (1, 1)}),
        # Published for 64: tensor 4, pipeline 4 x 5, context 2 (NeMo).
        ("llama-70b", 8, {"tensor": (2, 8), "pipeline": (2, 8)}),
        # Published for 1,024: tensor 8, pipeline 8 x 8, context 2 (NeMo); tensor 8, pipeline 16 (Llama 3).
        ("llama-405b", 128, {"tensor": (4, 8), "pipeline": (8, 32)}),
        # Published for 64: expert 8, nothing else (NeMo, on 180 GB), pipeline 4 besides (Megatron, on 80 GB).
        ("mixtral-8x7b", 8, {"expert": (4, 8), "tensor": (1, 2), "pipeline": (1, 4)}),
    ],
)
def test_the_best_layouts_are_like_the_published(
    tmp_path: Path, model: str, nodes: int, layout: dict[str, tuple[int, int]]
) -> None:
    found = planned(tmp_path, model, nodes)
    best = found["best"][0]
    for key, (least, most) in layout.items():
        assert least <= best["overrides"]["parallel"][key] <= most, best["layout"]
    room = load("h100").memory_bytes - load("h100").reserved_bytes
    for one in found["best"]:
        assert sum(one["bytes"].values()) <= room
        assert sum(one["seconds"].values()) == pytest.approx(one["step_seconds"])
        assert 0.2 < one["mfu_causal"] < one["mfu_full"] < 0.6
    assert [one["step_seconds"] for one in found["best"]] == sorted(one["step_seconds"] for one in found["best"])


def test_an_average_of_the_weights_takes_as_much_as_the_masters(tmp_path: Path) -> None:
    kept = ("optimizer.average_decay=null", "optimizer.average_decay=0.999")
    without, averaged = (planned(tmp_path, "llama-3b", 1, one)["best"][0] for one in kept)
    assert without["layout"] == averaged["layout"]
    kind = "masters and moments"
    assert averaged["bytes"][kind] == pytest.approx(without["bytes"][kind] * 16 / 12, rel=1e-3)


def test_a_thousand_accelerators_have_more_than_a_thousand_layouts(tmp_path: Path) -> None:
    assert planned(tmp_path, "mixtral-8x7b", 128, batch=4096)["tried"] > 1000


def test_every_rejection_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ["parallel.tensor=3", "parallel.pipeline=2"]
    found = planned(tmp_path, "llama-70b", 8, *own, batch=256)
    reasons = {one["name"]: one["reason"] for one in found["asked"]}
    assert "to divide the 64 ranks" in reasons["as configured"]
    assert reasons["data parallel alone, ZeRO-1, full recompute"].startswith("does not fit by ")
    # In one thing other than the best: it is slower and by what, does not fit and by how much, or is illegal.
    assert all(
        "slower: " in reason or "does not fit by " in reason or "expected" in reason or reason == "as fast"
        for reason in reasons.values()
    ), reasons
    said = capsys.readouterr().out
    assert all(reason in said for reason in reasons.values())


def test_a_deep_pipeline_with_few_micro_batches_is_mostly_bubble(tmp_path: Path) -> None:
    found = planned(tmp_path, "llama-8b", 4, "parallel.pipeline=16", "model.vocabulary_size=128", batch=16)
    configured = next(one for one in found["asked"] if one["name"] == "as configured")
    share = configured["seconds"]["bubble"] / configured["step_seconds"]
    # 8 micro-batches through 16 stages: (16 - 1) / (8 + 16 - 1), if all stages took the same time.
    assert share == pytest.approx(15 / 23, rel=0.1)
    assert f"{share:.0%} bubble" in configured["reason"]


def test_the_best_layout_is_what_train_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "layout.yaml"
    found = planned(tmp_path, "llama-405b", 128, "--output", str(output))
    capsys.readouterr()
    model = str(ROOT / "configs" / "model" / "llama-405b.yaml")
    assert cli.main(["train", model, str(output), "--print-config", *RUN]) == 0
    merged = yaml.safe_load(capsys.readouterr().out)
    wanted = found["best"][0]["overrides"]
    assert merged["train"]["micro_batch_size"] == wanted["train"]["micro_batch_size"]
    assert {key: merged["parallel"][key] for key in wanted["parallel"]} == wanted["parallel"]
    configuration.load([model, output])


def test_days_and_cost_follow_from_tokens_and_price(tmp_path: Path) -> None:
    best = planned(tmp_path, "llama-8b", 2, "--price", "2.5")["best"][0]
    step = 1024 * 8192  # tokens; the last step is a whole one
    assert best["days"] == pytest.approx(-(-(10**12) // step) * step / best["tokens_per_second"] / 86400)
    assert best["dollars"] == pytest.approx(best["days"] * 24 * 16 * 2.5)


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(ROOT / "configs" / "model" / "llama-70b.yaml")
    run = [model, *RUN, "train.global_batch_size=64"]
    assert "no known hardware: expected a100, b200, h100" in refused(capsys, *run, "--hardware", "h900")
    wrong = tmp_path / "mine.yaml"
    tree = yaml.safe_load((ROOT / "configs" / "hardware" / "h100.yaml").read_text())
    for change, said in (
        ({"memory": 3}, "the key memory does not exist"),
        ({"memory_bytes": "much"}, "memory_bytes is 'much': expected a number above 0"),
        ({"efficiency": {"matrices": 0.5}}, "efficiency: attention is missing"),
    ):
        wrong.write_text(yaml.safe_dump({**tree, **change}))
        assert said in refused(capsys, *run, "--hardware", str(wrong))
    assert "needs " in (told := refused(capsys, *run, "--hardware", "h100")), told
    assert "no layout of this model fits on 8 x NVIDIA H100" in told
    assert "model.hidden_size" in refused(capsys, "train.sequence_length=8", "--hardware", "h100")


def test_named_hardware_is_complete() -> None:
    for name in names():
        hardware = load(name)
        assert hardware.peak("bf16") > hardware.peak("fp32")
        with pytest.raises(UserError, match="gives"):
            hardware.peak("fp4")


@pytest.mark.truth
def test_the_held_out_half_of_published_step_times_is_predicted() -> None:
    errors = [abs(error(row)) for row in rows() if row.held_out]
    assert len(errors) > 30
    assert sum(one <= 0.2 for one in errors) / len(errors) >= 0.9
    assert sorted(errors)[len(errors) // 2] <= 0.1


def test_it_imports_no_torch() -> None:
    program = "import sys; from launcher.verbs import plan; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LORA = "model.lora.rank=16"


def test_adapters_fit_where_their_model_cannot_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 70 B parameters one accelerator of a node of eight holds an eighth of the weights, and no state of them."""
    found = planned(tmp_path, "llama-70b", 1, LORA, batch=64)
    # 16 (inputs + outputs) of queries and output, of keys and values, of gate, up and down, in each of 80 layers.
    adapters = 80 * 16 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    assert found["trained_parameters"] == adapters
    assert f"{found['frozen_parameters'] / 1e9:.3g}" == "70.6"
    assert "of them trained" in capsys.readouterr().out
    best = found["best"][0]
    state = best["bytes"]["masters and moments"] + best["bytes"]["gradients"]
    assert state < 16 * adapters < best["bytes"]["weights"]


def test_adapters_cost_four_operations_a_frozen_parameter(tmp_path: Path) -> None:
    one = ["parallel.tensor=4", "parallel.zero_stage=1", "train.micro_batch_size=1"]
    lora = [LORA, "model.lora.targets=[q_proj, v_proj]"]
    whole, adapted = (planned(tmp_path, "llama-8b", 1, *one, *more, batch=32) for more in ([], lora))
    whole, adapted = (next(one for one in plan["asked"] if one["name"] == "as configured") for plan in (whole, adapted))
    # Of a whole model's 6 of a parameter and 6 x 32 x 2 x 128 x length of a layer's attention, half of it causal.
    matrices, attention, adapters = 7.5e9, 32 * 6 * 32 * 2 * 128 * 8192 / 2, 6.8e6
    fewer = (4 * matrices + 6 * adapters + attention) / (6 * matrices + attention)
    utilisation = [one["mfu_causal"] * one["step_seconds"] for one in (adapted, whole)]
    assert utilisation[0] / utilisation[1] == pytest.approx(fewer, rel=0.01)
    assert 2 / 3 < adapted["step_seconds"] / whole["step_seconds"] < 0.9
    assert adapted["seconds"]["optimizer"] < 0.02 * whole["seconds"]["optimizer"]


@pytest.mark.parametrize("layout", [{}, {"tensor": 4}, {"pipeline": 4, "tensor": 2}], ids=str)
def test_what_is_sent_and_stepped_are_the_parameters_of_a_rank(layout: dict[str, Any]) -> None:
    model = configuration.load([ROOT / "configs" / "model" / "llama-8b.yaml"]).model
    for described in (model, replace(model, lora=LoraConfig(rank=16, targets=["q_proj", "v_proj", "down_proj"]))):
        cut = ParallelConfig(**layout)
        facts = Facts.of(described, vocabulary_size=128256, sequence_length=8192)
        stages = stage_shapes(described, cut, vocabulary_size=128256, optimizer=OptimizerConfig())
        setting = Setting(
            facts=facts,
            global_batch_size=8,
            micro_batch_size=1,
            layout=cut,
            ranks=8,
            node_ranks=8,
            precision=Precision.bf16,
            hardware=load("h100"),
        )
        found = [size for stage in stages for size in stage]
        trained = sum(size.elements for size in found if not size.is_frozen) / len(stages)
        assert trained_elements(setting) == pytest.approx(trained, rel=0.15 if cut.pipeline > 2 else 1e-3)
        if cut.pipeline == 1:
            assert stage_elements(setting) == pytest.approx(sum(size.elements for size in found), rel=1e-3)
