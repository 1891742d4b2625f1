"""Bits per byte against a plain computation, the baselines against theirs, and an evaluation that stands."""

import json
import lzma
import math
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from launcher.evaluation.baselines import bits_per_byte, text_bytes, unigram_bits_per_byte, xz_bits_per_byte
from launcher.places import find_checkpoint, find_run
from launcher.run_directory import RunDirectory
from parallel.common.errors import UserError
from tests.launcher.tiny import DOCUMENTS, configuration, ran, run, texts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """The directory of a finished run, evaluated."""
    directory = tmp_path_factory.mktemp("trained")
    ran("train", configuration(directory, store))
    ran("evaluate", directory / "run")
    return directory / "run"


def validation(source: str) -> str:
    """The validation text of a source."""
    return "".join(texts(source)[: DOCUMENTS // 10])


@pytest.mark.truth
def test_baselines_are_what_a_plain_computation_gives(store: Path) -> None:
    opened = Store.open(store)
    text = validation("code").encode()
    assert text_bytes(opened, "code") == len(text)
    assert xz_bits_per_byte(opened, "code") == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text))
    tokenizer = Tokenizer.load(opened.tokenizer)
    end = tokenizer.end_of_document
    held_out = DOCUMENTS // 10
    ids = [token for one in tokenizer.encode_batch(texts("code")[held_out:]) for token in [*one, end]]
    counts = Counter(ids)
    total = len(ids) + opened.vocabulary_size
    asked = [token for one in tokenizer.encode_batch(texts("code")[:held_out]) for token in [*one, end]]
    bits = sum(-math.log2((counts[token] + 1) / total) for token in asked)
    assert unigram_bits_per_byte(opened, "code") == pytest.approx(bits / len(text), rel=1e-12)


@pytest.mark.truth
@pytest.mark.distributed
def test_one_and_two_ranks_find_the_same(trained: Path, tmp_path: Path) -> None:
    one = json.loads((trained / "evaluation.json").read_text())
    (trained / "evaluation.json").unlink()
    ran("evaluate", trained, "--json", tmp_path / "two.json", ranks=2)
    two = json.loads((tmp_path / "two.json").read_text())
    assert two == json.loads((trained / "evaluation.json").read_text())
    for name in ("code", "prose"):
        assert two["sources"][name]["loss"] == pytest.approx(one["sources"][name]["loss"], rel=1e-6)
        assert two["sources"][name]["tokens"] == one["sources"][name]["tokens"]
    overall = one["overall"]
    assert overall["tokens"] == sum(row["tokens"] for row in one["sources"].values())
    nats = sum(row["loss"] * row["tokens"] for row in one["sources"].values())
    assert overall["bits_per_byte"] == pytest.approx(bits_per_byte(nats, overall["text_bytes"]))


def test_every_token_is_predicted_once(trained: Path, store: Path) -> None:
    opened = Store.open(store)
    result = json.loads((trained / "evaluation.json").read_text())
    for name in opened.sources:
        tokens = sum(shard.tokens for shard in opened.shards(split="validation", source=name))
        assert result["sources"][name]["tokens"] == tokens


def test_a_standing_evaluation_is_shown_and_another_checkpoint_is_not_taken_for_it(trained: Path) -> None:
    before = (trained / "evaluation.json").stat().st_mtime_ns
    ran("evaluate", trained)
    assert (trained / "evaluation.json").stat().st_mtime_ns == before
    ran("evaluate", f"{trained}@8")
    assert json.loads((trained / "evaluation.json").read_text())["step"] == 8
    ran("evaluate", trained / "checkpoints" / "step-00000012")
    assert json.loads((trained / "evaluation.json").read_text())["step"] == 12


def test_checkpoints_are_found_as_users_write_them(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = trained / "checkpoints" / "step-00000012"
    for text in (str(trained), str(newest), f"{trained}@12"):
        assert find_checkpoint(text).path == newest
    assert find_checkpoint(f"{trained}@4").manifest.step == 4
    with pytest.raises(UserError, match="has the steps 4, 8, 12"):
        find_checkpoint(f"{trained}@5")
    (trained.parent / "runs").mkdir()
    (trained.parent / "runs" / "named").symlink_to(trained)
    monkeypatch.chdir(trained.parent)
    assert find_run("named").path == Path("runs/named")
    with pytest.raises(UserError, match=r"a name under runs/ \(named\)"):
        find_run("other")


def test_samples_are_kept_and_a_second_call_shows_them(trained: Path) -> None:
    arguments = ("generate", trained, "--prompt", "iron ore", "--prompt", "", "--tokens", "6")
    first = ran(*arguments)
    assert first.startswith("iron ore")
    kept = list(RunDirectory(trained).samples)
    assert [sample["prompt"] for sample in kept[-2:]] == ["iron ore", ""]
    assert run(*arguments) == ([0], first)
    assert list(RunDirectory(trained).samples) == kept
    drawn = run("generate", trained, "--temperature", "1", "--seed", "3", "--tokens", "20")[1]
    assert drawn != run("generate", trained, "--temperature", "1", "--seed", "4", "--tokens", "20")[1]
    ran("generate", trained, "--temperature", "-1", code=2)
