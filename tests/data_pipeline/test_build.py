"""The whole build: what is reused, what is refused, what a kill leaves, and the words that a user reads."""

import gzip
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline import document, read, stages
from data_pipeline.build import build
from data_pipeline.config import (
    CleanConfig,
    DataConfig,
    NearDedupConfig,
    SourceConfig,
    StagesConfig,
    TokenizerConfig,
    ValidationConfig,
)
from data_pipeline.split import budgets, held_out
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import ConfigError, UserError
from parallel.common.files import hash_file

WORDS = ["iron", "ore", "furnace", "slag", "coal", "air", "bloom", "hammer", "anvil", "wrought", "中文", "größer"]


def write_corpus(directory: Path, documents: int = 200) -> Path:
    """Two files of made documents; a tenth are copies, a tenth near-copies, some are too short."""
    chance = random.Random(5)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("web", "books"):
        texts: list[str] = []
        for number in range(documents):
            text = " ".join(f"{chance.choice(WORDS)}{chance.randrange(40)}" for _ in range(chance.randrange(20, 200)))
            if number % 10 == 3:
                text = texts[-1]
            elif number % 10 == 6:
                text = texts[-1] + " and a little more"
            elif number % 50 == 7:
                text = "short"
            texts.append(text)
        with gzip.open(directory / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for number, text in enumerate(texts):
                file.write(json.dumps({"id": f"{name}-{number}", "text": text}) + "\n")
    return directory


def config_of(corpus: Path, store: Path, **fields: Any) -> DataConfig:
    sources = [SourceConfig(name=name, path=str(corpus / f"{name}.jsonl.gz")) for name in ("web", "books")]
    tokenizer = TokenizerConfig(vocabulary_size=384, sample_bytes=50_000)
    defaults: dict[str, Any] = {"sources": sources, "tokenizer": tokenizer, "shard_tokens": 20_000}
    return DataConfig(store=str(store), **(defaults | fields))


def content_of(store: Path) -> dict[str, str]:
    """Hash of every file, by name."""
    return {str(file.relative_to(store)): hash_file(file) for file in sorted(store.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built") / "store"
    build(config_of(corpus, path))
    return path


def test_the_store_holds_what_the_report_says(built: Path) -> None:
    store = Store.open(built)
    store.check()
    report = json.loads((built / "report.json").read_text())
    counts = report["stages"]["near"]["counts"]["sources"]
    assert store.sources == ("web", "books")
    for source in store.sources:
        documents = sum(shard.documents for shard in store.shards(source=source))
        assert documents == counts[source]["kept"]["documents"]
        assert sum(shard.text_bytes for shard in store.shards(source=source)) == counts[source]["kept"]["text_bytes"]
        assert store.shards(source=source, split="validation")
    assert report["stages"]["clean"]["counts"]["sources"]["web"]["dropped"]["with fewer than 20 characters"][
        "documents"
    ]
    assert set(report["stages"]) == {"read", "clean", "exact", "near", "split", "tokenizer", "store"}
    assert "samples" in report["stages"]["exact"]["counts"]


def test_tokens_of_the_store_decode_to_the_documents(built: Path, corpus: Path) -> None:
    store = Store.open(built)
    tokenizer = Tokenizer.load(store.tokenizer)
    texts = {}
    for name in ("web", "books"):
        with gzip.open(corpus / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts |= {record["id"]: record["text"] for record in map(json.loads, file)}
    seen: set[str] = set()
    for shard in store.shards():
        offsets = store.document_offsets(shard)
        ids = pq.read_table(built / f"{shard.stem}.docs.parquet").column("id").to_pylist()
        for identifier, start, stop in zip(ids, offsets, offsets[1:], strict=False):
            tokens = store.tokens(shard)[start:stop].tolist()
            assert tokens[-1] == store.end_of_document
            assert tokenizer.decode(tokens[:-1]) == texts[identifier]
        seen |= set(ids)
    clusters = pq.read_table(built / "clusters.parquet").to_pylist()
    removed = {row["removed_id"] for row in clusters}
    assert not removed & seen
    assert {row["kept_id"] for row in clusters} <= seen
    assert {identifier for identifier, text in texts.items() if len(text) >= 20} == seen | removed


def test_any_number_of_threads_gives_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "BATCH_BYTES", 20_000)
    for workers in (1, 3):
        monkeypatch.setattr(document, "workers", lambda count=workers: count)
        build(config_of(corpus, tmp_path / str(workers)))
    assert content_of(tmp_path / "1") == content_of(tmp_path / "3")


def test_a_second_build_reuses_everything(corpus: Path, built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in built.rglob("*")}
    build(config_of(corpus, built))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["read", "clean", "exact", "near", "split", "tokenizer", "store"]
    assert all(line.endswith("(as before)") for line in printed)
    assert {file: file.stat().st_mtime_ns for file in built.rglob("*")} == before


def test_a_change_makes_only_the_stages_after_it_anew(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    build(config_of(corpus, store))
    content = content_of(store)
    changed = config_of(corpus, store, tokenizer=TokenizerConfig(vocabulary_size=512, sample_bytes=50_000))
    with pytest.raises(UserError, match=r"changed: tokenizer.*another data\.store, or --overwrite"):
        build(changed)
    assert content_of(store) == content
    capsys.readouterr()
    build(changed, overwrite=True)
    assert [line.endswith("(as before)") for line in capsys.readouterr().out.splitlines()] == [True] * 5 + [False] * 2
    assert Store.open(store).vocabulary_size == 512
    build(config_of(corpus, store), overwrite=True)
    assert content_of(store) == content


def test_an_unfinished_store_of_another_configuration_is_rebuilt(corpus: Path, built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    clean = StagesConfig(clean=CleanConfig(min_characters=500))
    build(config_of(corpus, store, stages=clean))
    lines = (store / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (store / "manifest.jsonl").write_bytes(b"".join(lines[:2]))
    build(config_of(corpus, store))
    assert content_of(store) == content_of(built)


def test_touched_files_change_nothing_and_other_documents_are_noticed(corpus: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(corpus, tmp_path / "corpus")
    store = tmp_path / "store"
    build(config_of(copied, store))
    content = {name: found for name, found in content_of(store).items() if not name.startswith("stages/read")}
    for file in copied.iterdir():
        os.utime(file)
    build(config_of(copied, store))
    assert content.items() <= content_of(store).items()
    raw = gzip.decompress((copied / "web.jsonl.gz").read_bytes()).replace(b"iron", b"gold")
    same_size = gzip.compress(raw)
    (copied / "web.jsonl.gz").write_bytes(same_size)
    with pytest.raises(UserError, match="input files"):
        build(config_of(copied, store))


def test_a_missing_or_damaged_stage_is_made_again(corpus: Path, built: Path, tmp_path: Path) -> None:
    store = shutil.copytree(built, tmp_path / "store")
    (store / "manifest.jsonl").unlink()
    (store / "stages" / "near" / "removed.parquet").write_bytes(b"")
    shutil.rmtree(store / "stages" / "split")
    (store / "stages" / ".clean.partial").mkdir()
    (store / ".report.json.77.tmp").write_bytes(b"half")
    build(config_of(corpus, store))
    assert content_of(store) == content_of(built)


def test_a_damaged_finished_store_says_so_and_overwrite_mends_it(corpus: Path, built: Path, tmp_path: Path) -> None:
    store = shutil.copytree(built, tmp_path / "store", copy_function=shutil.copy2)
    (store / "shard-00000.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"shard-00000\.bin"):
        build(config_of(corpus, store))
    build(config_of(corpus, store), overwrite=True)
    assert content_of(store) == content_of(built)


@pytest.mark.parametrize("step", ["write_json", "sync_directory"])
def test_dying_before_or_after_each_commit_is_mended(
    corpus: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    store = tmp_path / "store"
    for committed in range(6):
        done = list((store / "stages").glob("[!.]*")) if store.exists() else []
        assert len(done) == (committed if step == "sync_directory" else 0)
        with monkeypatch.context() as patched:
            patched.setattr(stages, step, die)
            with pytest.raises(KeyboardInterrupt):
                build(config_of(corpus, store))
    build(config_of(corpus, store))
    assert content_of(store) == content_of(built)


def test_bad_input_is_told_in_one_sentence(tmp_path: Path, corpus: Path) -> None:
    good = corpus / "web.jsonl.gz"
    (tmp_path / "other.jsonl").write_text('{"content": "a text that is long enough to stay in the corpus"}\n')
    (tmp_path / "tiny.jsonl").write_text('{"text": "tiny"}\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(good.read_bytes()[:-500])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, store, said in (
        (tmp_path / "none.jsonl", "s", "there is no file or directory"),
        (
            tmp_path / "other.jsonl",
            "s",
            "web is empty after the stage read.*1 no text field.*one of the fields there: content",
        ),
        (tmp_path / "tiny.jsonl", "s2", "web is empty after the stage clean.*1 with fewer than 20 characters"),
        (tmp_path / "cut.jsonl.gz", "s3", r"cut\.jsonl\.gz cannot be read: it is cut off"),
        (good, "full", r"holds other files \(thesis\.tex\)"),
        (good, "file", "cannot be made"),
    ):
        config = config_of(corpus, tmp_path / store, sources=[SourceConfig(name="web", path=str(path))])
        with pytest.raises(UserError, match=said) as caught:
            build(config)
        assert "\n" not in str(caught.value)
    assert sorted(file.name for file in (tmp_path / "full").iterdir()) == ["thesis.tex"]


def test_all_problems_of_a_configuration_are_told_at_once(tmp_path: Path, corpus: Path) -> None:
    config = config_of(
        corpus,
        tmp_path / "store",
        sources=[SourceConfig(name="a/b", path="x"), SourceConfig(name="ok", path=[]), SourceConfig(name="ok", path=3)],
        stages=StagesConfig(near_dedup=NearDedupConfig(threshold=1.5)),
        validation=ValidationConfig(share=0.9),
    )
    with pytest.raises(ConfigError) as caught:
        build(config)
    assert [problem.key for problem in caught.value.problems] == [
        "data.sources.0.name",
        "data.sources.1.path",
        "data.sources.2.name",
        "data.sources.2.path",
        "data.stages.near_dedup.threshold",
        "data.validation.share",
    ]


def test_a_full_disk_is_told_before_a_stage_and_while_it_runs(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the stage read writes about .* where only 0.977 KiB are free"):
        build(config_of(corpus, tmp_path / "store"))
    monkeypatch.undo()
    monkeypatch.setattr(stages.Workspace, "_commit", _no_space)
    with pytest.raises(UserError, match="ran full in the stage read"):
        build(config_of(corpus, tmp_path / "store"))
    assert not any((tmp_path / "store" / "stages").iterdir())


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_two_builds_do_not_share_a_store(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(corpus, tmp_path / "store")
    seen: list[str] = []

    def nested(*_: Any, **__: Any) -> None:
        with pytest.raises(UserError, match="another `bloomery data build` is at work") as caught:
            build(config)
        seen.append(str(caught.value))
        raise UserError("enough")

    monkeypatch.setattr(stages.Workspace, "run", nested)
    with pytest.raises(UserError, match="enough"):
        build(config)
    assert seen


def test_stages_that_are_switched_off_are_left_out(corpus: Path, tmp_path: Path) -> None:
    off = StagesConfig(exact_dedup=False, near_dedup=NearDedupConfig(enabled=False))
    store = build(config_of(corpus, tmp_path / "store", stages=off, validation=ValidationConfig(share=0)))
    report = json.loads((store.path / "report.json").read_text())
    assert set(report["stages"]) == {"read", "clean", "split", "tokenizer", "store"}
    documents = sum(shard.documents for shard in store.shards())
    assert documents == sum(e["kept"]["documents"] for e in report["stages"]["clean"]["counts"]["sources"].values())
    assert not store.shards(split="validation")
    assert pq.read_table(store.path / "clusters.parquet").num_rows == 0


def test_bands_that_miss_many_pairs_are_told(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(config_of(corpus, tmp_path / "store", stages=StagesConfig(near_dedup=NearDedupConfig(threshold=0.5))))
    assert "the bands find only 27% of the pairs at 0.5" in capsys.readouterr().out


def test_a_given_tokenizer_is_used_as_it_is(corpus: Path, built: Path, tmp_path: Path) -> None:
    given = TokenizerConfig(path=str(built / "tokenizer.json"))
    store = build(config_of(corpus, tmp_path / "store", tokenizer=given))
    assert store.tokenizer.read_bytes() == (built / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match=r"there is no tokenizer\.json"):
        build(config_of(corpus, tmp_path / "store2", tokenizer=TokenizerConfig(path=str(tmp_path / "none.json"))))


def test_documents_with_one_id_are_all_kept(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "a.jsonl").open("w") as file:
        for number in range(40):
            file.write(json.dumps({"id": "same", "text": f"{WORDS[number % 10]} number {number} " * 6}) + "\n")
    sources = [SourceConfig(name="web", path=str(tmp_path / "in"))]
    store = build(config_of(tmp_path, tmp_path / "store", sources=sources))
    tables = [pq.read_table(store.path / f"{shard.stem}.docs.parquet") for shard in store.shards()]
    ids = [identifier for table in tables for identifier in table.column("id").to_pylist()]
    assert len(set(ids)) == len(ids) == 40
    assert json.loads((store.path / "report.json").read_text())["stages"]["read"]["repeated_ids"] == 39


def test_the_split_follows_from_the_id_alone() -> None:
    hashes = np.random.default_rng(3).integers(0, 2**64, 20_000, dtype=np.uint64)
    source = np.repeat(np.array([0, 1], dtype=np.int16), 10_000)
    chosen = held_out(hashes, source, 0.05)
    assert 0.04 < chosen.mean() < 0.06
    assert np.array_equal(chosen[:5000], held_out(hashes[:5000], source[:5000], 0.05))
    assert held_out(hashes[:3], source[:3], 0.001).sum() == 1
    assert held_out(hashes[:1], source[:1], 0.001).sum() == 0
    assert not held_out(np.array([1], np.uint64), np.array([0], np.int16), 0.05).any()
    assert held_out(hashes[:3], source[:3], 0).sum() == 0


def test_budgets_go_by_weight_and_small_sources_leave_theirs_to_others() -> None:
    assert budgets({"a": 1000, "b": 1000}, {"a": 3, "b": 1}, 400) == {"a": 300, "b": 100}
    assert budgets({"a": 50, "b": 1000}, {"a": 3, "b": 1}, 400) == {"a": 50, "b": 350}
    assert budgets({"a": 50, "b": 60}, {"a": 3, "b": 1}, 400) == {"a": 50, "b": 60}
    assert budgets({"a": 500, "b": 600}, {"a": 1, "b": 0}, 400) == {"a": 400, "b": 0}
