"""muP: training moves things as far at every width, each parameter's numbers by hand, an export that agrees."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from data_pipeline.loader import single_pass
from data_pipeline.store import VALIDATION, Store
from launcher.config import load
from launcher.verbs.conversion import export_main
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from model.config import FamilyName, ModelConfig, MoeConfig, MupConfig, Norm, Position
from model.rope import score_scale
from parallel.common.errors import UserError
from parallel.parameters import setting_of
from parallel.rules import Setting
from tests.distributed.layouts import tiny
from tests.launcher.test_conversion import in_process
from tests.launcher.tiny import configuration, make_store, ran

pytestmark = [pytest.mark.truth, pytest.mark.distributed]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("corpus") / "store")


BASE, WIDTHS, STEPS = 32, (32, 256), 4


def case(width: int, *, scaled: bool, learning_rate: float = 1e-2, **values: Any) -> Case:
    """The tiny model at a width, with heads of 8; all widths grow together."""
    found = tiny(zero_stage=0)
    own = {"hidden_size": width, "heads": width // 8, "kv_heads": width // 16, "ffn_hidden_size": 2 * width}
    sizes = {"layers": 2, "mup": MupConfig(base_hidden_size=BASE if scaled else None), **own, **values}
    model = replace(found.config.model, **sizes)
    optimizer = replace(found.config.optimizer, learning_rate=learning_rate, clip_norm=0.0)
    return replace(found, config=replace(found.config, model=model, optimizer=optimizer))


def moved(width: int, scaled: bool) -> dict[str, float]:
    """How far some steps on one batch move what each block adds to the residual stream and the logits: root mean
    squares."""
    chosen = case(width, scaled=scaled)
    engine = engine_of(chosen)
    model = engine.updater.module.chunks[0]
    batch = batch_of(chosen, 1, engine.topology)
    seen: list[dict[str, torch.Tensor]] = []

    def look() -> None:
        found: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _module, _args, output: found.update({name: output[0].detach().clone()})

        hooks = [
            module.register_forward_hook(keep(f"{number} {part}"))
            for number, layer in enumerate(model.decoder.layers)
            for part, module in (("attention", layer.self_attention), ("mlp", layer.mlp))
        ]
        with torch.no_grad():
            found["logits"] = model(batch)
        for hook in hooks:
            hook.remove()
        seen.append(found)

    look()
    for _ in range(STEPS):
        engine.step(batch)
    look()
    return {name: float((seen[1][name] - start).square().mean().sqrt()) for name, start in seen[0].items()}


def sizes(scaled: bool) -> list[dict[str, float]]:
    return [run_world(moved, 1, width, scaled)[0] for width in WIDTHS]


def test_what_training_moves_is_as_large_at_every_width() -> None:
    with_rules, without = sizes(True), sizes(False)
    assert with_rules[0] == without[0], "at the base width nothing changes, to the bit"
    for name in with_rules[0]:
        growth = [found[-1][name] / found[0][name] for found in (with_rules, without)]
        assert 0.4 < growth[0] < 1.5, (name, growth)
        assert growth[1] > 3, (name, growth)


def rules(values: dict[str, Any]) -> dict[str, tuple[float, Setting]]:
    """Of each matrix the standard deviation of its first values, and what the optimizer steps it by."""
    chosen = case(128, scaled=True, **values)
    parameters = engine_of(chosen).parameters
    config = chosen.config.optimizer
    return {
        one.name: (float(one.parameter.detach().float().std()), setting_of(one, config))
        for one in parameters
        if one.is_matrix
    }


HIDDEN, INTO_RESIDUAL = ("linear_qkv", "linear_fc1", "pooler", "dense"), ("linear_proj", "linear_fc2")


@pytest.mark.parametrize(
    "values",
    [
        {"moe": MoeConfig(experts=4)},
        {
            "family": FamilyName.bert, "next_sentence": True, "norm": Norm.layer, "position": Position.learned,
            "tie_embeddings": True, "linear_bias": True, "kv_heads": None,
        },
    ],
    ids=["experts", "bert"],
)  # fmt: skip
def test_each_matrix_has_the_numbers_of_the_table(values: dict[str, Any]) -> None:
    (found,) = run_world(rules, 1, values)
    times = 128 / BASE
    std, decay = 0.1, 0.1
    for name, (deviation, setting) in found.items():
        wide = any(part in name for part in (*HIDDEN, *INTO_RESIDUAL))
        few = "router" in name or "classifier" in name
        assert wide or few or "embedding" in name or "segments" in name or name == "output_layer.weight", name
        expected = std / times if few else std / times**0.5 if wide else std
        expected /= 2 if any(part in name for part in INTO_RESIDUAL) else 1  # the root of two times two layers
        assert deviation == pytest.approx(expected, rel=0.12), name
        factor = 1 / times if wide or few else 1.0
        assert setting == Setting(learning_rate_factor=factor, weight_decay=decay / factor), name
    assert sum("router" in name or "classifier" in name for name in found) in (1, 2)


def test_scores_are_divided_by_the_size_of_a_head_where_that_grows() -> None:
    model = ModelConfig(layers=1, hidden_size=64, heads=2, ffn_hidden_size=64)
    assert score_scale(model) is None
    grown = replace(model, mup=MupConfig(base_hidden_size=16, base_head_size=8))
    assert score_scale(grown) == pytest.approx(8**0.5 / 32)
    assert score_scale(replace(grown, hidden_size=16)) is None  # heads of 8: the base itself


@pytest.mark.parametrize("tied", [False, True])
def test_a_trained_model_is_exported_with_its_factor_in_the_output_layer(
    tied: bool, store: Path, tmp_path: Path
) -> None:
    model = {"mup": {"base_hidden_size": 8}, "tie_embeddings": tied, "initial_std": 0.2}
    ran("train", configuration(tmp_path, store, model=model, evaluate={"every_steps": 12, "batches": 1}))
    if tied:
        with pytest.raises(UserError, match=r"a model with model\.tie_embeddings is not converted"):
            in_process(export_main, tmp_path / "run", "--output", tmp_path / "hf")
        return
    assert in_process(export_main, tmp_path / "run", "--output", tmp_path / "hf") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    opened = Store.open(store)
    config = load(sorted((tmp_path / "run").glob("config.yaml")))
    losses, weights = 0.0, 0.0
    batches = single_pass(
        opened, VALIDATION, sequence_length=32, global_batch_size=4, micro_batch_size=2, dp_rank=0, dp_size=1,
        mask_documents=config.data.mask_documents,
    )  # fmt: skip
    for batch in islice(batches, 1):
        for row in range(4):
            ids = batch["document_ids"][row]
            for number in ids.unique().tolist():
                mine = ids == number
                logits = theirs(batch["tokens"][row][mine][None]).logits[0].detach()
                found = cross_entropy(logits, batch["labels"][row][mine], reduction="none")
                losses += float((found * batch["loss_weights"][row][mine]).sum())
                weights += float(batch["loss_weights"][row][mine].sum())
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert losses / weights == pytest.approx(last["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("optimizer.name=muon",), "optimizer.name is 'muon': expected adamw with model.mup"),
        (("model.scale_embeddings=true",), "model.scale_embeddings is True: expected false with model.mup"),
        (("model.mup.base_hidden_size=null", "model.mup.base_head_size=4"), "model.mup.base_head_size is 4"),
    ],
)
def test_what_does_not_go_with_it_is_named(overrides: tuple[str, ...], told: str, store: Path, tmp_path: Path) -> None:
    said = ran("train", configuration(tmp_path, store, model={"mup": {"base_hidden_size": 8}}), *overrides, code=2)
    assert told in said
