"""`bloomery verify`: what is kept when a configuration shrinks, what a list may hold, exit codes and the certificate.

That the proofs are right is held by tests/distributed (test_layouts.py, test_planted_bugs.py).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher import config as configuration
from launcher.verify.batches import Traits, synthetic_batch
from launcher.verify.compare import errors, whole
from launcher.verify.matrix import read_rows, row
from launcher.verify.shrink import Shrunk, complete, shrink
from model import norms
from parallel.common.errors import ConfigError, UserError
from tests.distributed.layouts import tiny
from tests.launcher.tiny import ROOT, ran

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def shrunk(*overrides: str, ranks: int | None = None, file: str = QUICKSTART) -> list[Shrunk]:
    return shrink(*complete(configuration.load([file], overrides), ranks))


def test_every_dimension_is_kept_and_data_parallel_becomes_two() -> None:
    (small,) = shrunk(
        "parallel.tensor=4", "parallel.pipeline=2", "train.global_batch_size=64", "train.micro_batch_size=1", ranks=64
    )
    assert small.name == "tensor 4 x pipeline 2 x data 2"
    assert small.ranks == 16
    changed = {change.key: (change.was, change.now) for change in small.changes}
    assert changed["ranks"] == (64, 16)
    assert changed["data parallel"] == (8, 2)
    assert changed["model.hidden_size"][0] == 256
    assert not small.dropped


def test_a_layout_of_many_ranks_is_kept_whole_at_smaller_degrees_and_in_pairs_at_larger_ones() -> None:
    own, *pairs = shrunk(
        "parallel.tensor=4",
        "parallel.pipeline=8",
        "parallel.context=2",
        "model.layers=8",
        "train.global_batch_size=64",
        "train.micro_batch_size=1",
        ranks=128,
    )
    assert own.name == "tensor 2 x pipeline 2 x context 2 x data 2"
    names = [pair.name for pair in pairs]
    assert "pipeline 4 x data 2" in names
    assert "tensor 4 x context 2" in names
    assert all(pair.ranks <= 8 for pair in pairs)
    assert "context 2 x data 2" not in names, "the proof of all dimensions has these degrees already"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "kind"), [(8, 8, "own"), (8, 4, "grouped"), (32, 4, "grouped"), (8, 1, "one")]
)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_heads_stay_what_they_are(heads: int, kv_heads: int, kind: str, tensor: int) -> None:
    if kv_heads % tensor:
        return
    small = shrunk(f"model.heads={heads}", f"model.kv_heads={kv_heads}", f"parallel.tensor={tensor}")[0].config.model
    assert small.kv_heads is not None
    assert small.heads % tensor == small.kv_heads % tensor == 0
    found = "own" if small.kv_heads == small.heads else "one" if small.kv_heads == 1 else "grouped"
    assert found == kind


def test_an_uneven_split_stays_uneven() -> None:
    small = shrunk("model.layers=16", "parallel.pipeline=4", "parallel.pipeline_split=[3,5,5,3]")[0].config
    assert small.parallel.pipeline_split == [1, 2, 2, 1]
    assert small.model.layers == 6


def test_experts_keep_their_copies_where_there_is_room() -> None:
    given = ("model.moe.experts=64", "model.moe.top_k=6", "parallel.expert=8", "train.global_batch_size=256")
    (small,) = shrunk(*given, "train.micro_batch_size=1", ranks=64)
    layout = small.config.parallel
    assert layout.expert == 8
    assert small.ranks == 16, "two copies of each expert"
    assert small.config.model.moe.experts % 8 == 0
    assert small.config.model.moe.top_k == 6
    assert not small.dropped
    (alone,) = shrunk(*given, "train.micro_batch_size=1", ranks=8)
    assert (alone.ranks, alone.config.parallel.expert) == (8, 8)


def test_what_is_recomputed_or_windowed_in_part_stays_so() -> None:
    small = shrunk(
        "model.layers=8",
        "parallel.pipeline=2",
        "parallel.recompute={mode: full, blocks: 3}",
        "model.sliding_window=64",
        "model.rope_scaling.factor=8",
    )[0].config
    assert small.parallel.recompute.blocks == 1
    assert small.model.layers == 4, "two layers a stage, of which one recomputes"
    assert small.model.sliding_window is not None
    assert small.model.sliding_window < small.train.sequence_length
    assert small.model.rope_scaling.original_positions < small.train.sequence_length


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_named_model_needs_nothing_else_to_be_verified(file: Path) -> None:
    layers = configuration.load([str(file)]).model.layers
    split = [f"parallel.pipeline_split=[{layers // 2 + 1},{layers // 2}]"] if layers % 2 else []
    small = shrunk("parallel.pipeline=2", *split, file=str(file))[0]
    assert small.ranks == 4
    assert small.config.model.hidden_size <= 128


def test_an_illegal_layout_is_told_with_all_its_problems(capfd: pytest.CaptureFixture[str]) -> None:
    said = ran("verify", QUICKSTART, "parallel.tensor=3", "parallel.pipeline=3", "--ranks", "9", code=2)
    assert "parallel.tensor is 3" in said
    assert "model.layers is 2" in said


def test_batches_are_uneven_in_every_way_unless_told() -> None:
    config = tiny().config
    batch = synthetic_batch(config, 1, Traits())
    assert batch["document_ids"].amax(dim=1).unique().tolist() == [0, 1, 2]
    assert len(batch["loss_weights"].sum(dim=1).unique()) > 1
    assert ((batch["positions"] == 0).sum(dim=1) == batch["document_ids"].amax(dim=1) + 1).all()
    plain = synthetic_batch(config, 1, Traits(packed=False, positioned=False, unequal=False, silent_slices=2))
    assert plain["document_ids"].sum() == plain["positions"].sum() == 0
    assert plain["loss_weights"].sum(dim=0).tolist() == [8, 8, 8, 8, 8, 8, 8, 0] * 2
    assert (plain["tokens"] == batch["tokens"]).all()


def test_the_error_of_a_tensor_is_relative_to_its_norm_or_to_a_millionth_of_all() -> None:
    reference = {"large": np.full(4, 3.0), "zero": np.zeros(2), "lost": np.ones(1)}
    ours = {"large": np.full(4, 3.3), "zero": np.full(2, 1e-7), "lost": np.full(1, np.nan)}
    found = errors(ours, reference)
    assert found["large"] == pytest.approx(0.1)
    assert found["zero"] == pytest.approx(1e-7 * 2**0.5 / (1e-6 * 37**0.5))
    assert found["lost"] == np.inf


def test_copies_that_differ_are_found() -> None:
    described: Any = type("Described", (), {"key": "w", "global_shape": (4,), "global_slice": lambda _: slice(0, 2)})()
    rest: Any = type("Described", (), {"key": "w", "global_shape": (4,), "global_slice": lambda _: slice(2, 4)})()
    same = whole([[(described, np.ones(2)), (rest, np.ones(2))], [(described, np.ones(2))]])
    assert not same.copies
    other = whole([[(described, np.ones(2)), (rest, np.ones(2))], [(described, np.full(2, 1.5))]])
    assert other.spreads()["w"] > 0.1
    with pytest.raises(AssertionError, match="no rank holds a part of"):
        whole([[(described, np.ones(2))]])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1", "holds no rows"),
        ("[]", "holds no rows"),
        ("- {ranks: 2}", "row 1 of .* has no name"),
        ("- {name: x, rank: 2}", "has 'rank': expected name, ranks, model, set, ci"),
        ("- {name: x, ranks: 0}", "expected a whole number above 0"),
        ("- {name: x}\n- {name: x}", "two rows .* are called x"),
        ("- {name: x, set: [1]}", "has a wrong `set`"),
        ("- {name: x, set: {parallel.tenser: 2}}", "row x of .*did you mean 'tensor'"),
        ("- {name: x, model: 7}", "row x of .* has model: 7; expected a path beside it"),
        ("- {name: x, model: absent.yaml}", "row x of .*absent.yaml"),
        ("- {name: x", "cannot be read"),
    ],
)
def test_a_list_that_is_wrong_says_where(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(text)
    with pytest.raises(UserError, match=told):
        read_rows(tmp_path / "rows.yaml", [QUICKSTART], [])


def test_the_problems_of_all_rows_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(
        "- {name: odd, ranks: 2, set: {parallel.tensor: 3}}\n- {name: fine}\n"
        "- {name: deep, set: {parallel.pipeline: 2, parallel.zero_stage: 3}}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_rows(tmp_path / "rows.yaml", [QUICKSTART], [])
    told = str(caught.value)
    assert "row odd: parallel.tensor is 3" in told
    assert "row deep: parallel.zero_stage is 3" in told
    assert "row fine" not in told


def test_a_row_may_name_its_model(tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text(
        "model: {layers: 4, hidden_size: 64, heads: 4, ffn_hidden_size: 96, sliding_window: 8, full_attention_every: 3}"
    )
    (tmp_path / "rows.yaml").write_text("- {name: x, model: wide.yaml, set: {model.heads: 2}}\n")
    (found,) = read_rows(tmp_path / "rows.yaml", [], [])
    assert (found.config.model.hidden_size, found.config.model.heads) == (64, 2)
    assert found.proofs[0].config.model.full_attention_every == 2, "both kinds of layers, of two"


def test_ranks_are_the_smallest_with_two_slices_unless_given() -> None:
    assert row("", [QUICKSTART], ["parallel.tensor=2"], None).ranks == 4
    experts = ["model.moe.experts=8", "parallel.expert=4", "train.micro_batch_size=1"]
    assert row("", [QUICKSTART], experts, None).ranks == 4
    with pytest.raises(ConfigError, match="to divide the 3 ranks"):
        row("", [QUICKSTART], ["parallel.tensor=2"], 3)


@pytest.mark.distributed
def test_a_proven_layout_has_a_certificate(tmp_path: Path) -> None:
    said = ran("verify", QUICKSTART, "parallel.tensor=2", "--ranks", "2", "--strict", "--json", tmp_path / "c")
    assert "tensor 2 on 2 ranks" in said
    assert "is proven equal to one rank" in said
    found = json.loads((tmp_path / "c").read_text())
    assert (found["format_version"], found["passed"], found["strict"]) == (1, True, True)
    assert set(found["versions"]) == {"python", "bloomery", "torch", "megatron-core", "deepspeed"}
    (layout,) = found["layouts"]
    assert (layout["ranks"], layout["proven_by"], layout["dropped"]) == (2, "itself", [])
    assert layout["parallel"]["tensor"] == 2
    (proof,) = layout["proofs"]
    assert {"key": "model.ffn_hidden_size", "was": 704, "now": 48} in proof["shrunk"]
    assert [each["name"] for each in proof["runs"]] == ["float64", "fp32 ZeRO-1"]
    checks = {check["what"]: check for check in proof["runs"][0]["checks"]}
    assert checks["gradients"]["compared"] == 15
    assert 0 < checks["gradients"]["error"] <= checks["gradients"]["limit"] == 1e-11
    assert proof["runs"][1]["held_bytes"]["moments"]["alone"] > 0


@pytest.mark.distributed
def test_a_wrong_row_fails_the_list_and_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "copy_to_tensor_model_parallel_region", lambda weight: weight)
    (tmp_path / "rows.yaml").write_text(
        "- {name: right, ranks: 1}\n- {name: wrong, ranks: 2, set: {parallel.tensor: 2}}\n"
    )
    said = ran(
        "verify", QUICKSTART, "model.kv_heads=8", "--matrix", tmp_path / "rows.yaml", "--json", tmp_path / "c", code=1
    )
    lines = said.splitlines()
    assert "right" in lines[0]
    assert "proven" in lines[0]
    assert "wrong" in lines[1]
    assert "WRONG" in lines[1]
    assert "likely cause: the gradients of norms are not summed over the tensor ranks" in said
    assert "1 of 2 layouts are proven" in lines[-1]
    right, wrong = json.loads((tmp_path / "c").read_text())["layouts"]
    assert right["passed"]
    assert not wrong["passed"]
    assert "not summed" in wrong["proofs"][0]["likely_cause"]
    assert "sequence parallel" in wrong["proofs"][0]["smallest_failing"]


@pytest.mark.distributed
def test_a_layout_that_does_not_run_is_named_with_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(norms.RMSNorm, "forward", fail)
    said = ran("verify", QUICKSTART, "--ranks", "1", code=1)
    assert "likely cause: the layout does not run: RuntimeError: no such kernel (rank 0, " in said
