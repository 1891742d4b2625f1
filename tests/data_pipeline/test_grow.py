"""Stores that grow: killed anywhere, added to, followed, and held against brute force."""

import json
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from data_pipeline.build import build
from data_pipeline.config import DataConfig, GrowConfig, IndexKind, SourceConfig, TokenizerConfig, ValidationConfig
from data_pipeline.dedup.index import Index
from data_pipeline.following import Following
from data_pipeline.growth.job import grow
from data_pipeline.loader import Loader
from data_pipeline.plan import Plan
from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import ConfigError, UserError
from parallel.common.files import hash_file
from tests.data_pipeline.stores import small_tokenizer
from tests.data_pipeline.test_build import write_corpus
from tests.data_pipeline.test_dedup import jaccard_of, shingles_of


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_corpus(tmp_path_factory.mktemp("grow"), documents=120)
    small_tokenizer().save(directory / "tokenizer.json")
    return directory


def config_of(corpus: Path, store: Path, **fields: Any) -> DataConfig:
    sources = [SourceConfig(name=name, path=str(corpus / f"{name}.jsonl.gz")) for name in ("web", "books")]
    defaults: dict[str, Any] = {
        "sources": sources,
        "tokenizer": TokenizerConfig(path=str(corpus / "tokenizer.json")),
        "grow": GrowConfig(portion_bytes=8_000),
        "validation": ValidationConfig(share=0.05),
    }
    return DataConfig(store=str(store), **(defaults | fields))


def content_of(store: Path) -> dict[str, str]:
    """Hash of every file but those of the index, which is made anew where it is lost."""
    files = (file for file in sorted(store.rglob("*")) if file.is_file() and "index" not in file.parts)
    return {str(file.relative_to(store)): hash_file(file) for file in files if file.name != "report.html"}


def texts_of(store: Store) -> dict[str, str]:
    tokenizer = Tokenizer.load(store.tokenizer)
    found: dict[str, str] = {}
    for shard in store.shards():
        offsets = store.document_offsets(shard)
        ids = pq.read_table(store.path / f"{shard.stem}.docs.parquet")["id"].to_pylist()
        for identifier, start, stop in zip(ids, offsets, offsets[1:], strict=False):
            assert identifier not in found
            found[identifier] = tokenizer.decode(store.tokens(shard)[start : stop - 1].tolist())
    return found


def records(corpus: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("web", "books"):
        for line in subprocess.run(
            ["zcat", str(corpus / f"{name}.jsonl.gz")], capture_output=True, check=True
        ).stdout.splitlines():
            record = json.loads(line)
            found[record["id"]] = record["text"]
    return found


@pytest.fixture(scope="module")
def grown(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grown") / "store"
    grow(config_of(corpus, path))
    return path


def assert_exact(texts: dict[str, str], came: dict[str, str], clusters: list[dict[str, Any]]) -> None:
    """Nothing is lost, no two that are kept resemble each other, and whoever went has a kept twin."""
    removed = {row["removed_id"]: row for row in clusters}
    assert len(removed) == len(clusters)
    assert set(texts) | set(removed) == {identifier for identifier, text in came.items() if len(text) >= 20}
    assert not set(texts) & set(removed)
    sets = {identifier: shingles_of(text) for identifier, text in came.items()}
    kept = sorted(texts)
    assert not any(jaccard_of(sets[a], sets[b]) >= 0.8 for i, a in enumerate(kept) for b in kept[:i])
    for identifier, row in removed.items():
        assert row["kept_id"] in came
        assert row["jaccard"] == pytest.approx(jaccard_of(sets[identifier], sets[row["kept_id"]]))
        assert row["jaccard"] >= 0.8


def test_what_is_kept_is_right_over_all_portions(corpus: Path, grown: Path) -> None:
    store = Store.open(grown)
    store.check()
    assert len(list((grown / "growth").glob("0*"))) > 5
    assert all(shard.window for shard in store.shards())
    texts = texts_of(store)
    came = records(corpus)
    assert all(came[identifier] == text for identifier, text in texts.items())
    assert_exact(texts, came, pq.read_table(grown / "growth" / "clusters.parquet").to_pylist())
    report = json.loads((grown / "growth" / "report.json").read_text())["stages"]
    assert sum(entry["kept"]["documents"] for entry in report["near"]["counts"]["sources"].values()) == len(texts)
    assert store.shards(split="validation")


def test_the_same_command_again_changes_nothing(corpus: Path, grown: Path) -> None:
    before = content_of(grown)
    grow(config_of(corpus, grown))
    assert content_of(grown) == before


def test_an_index_that_is_lost_is_made_anew(corpus: Path, grown: Path, tmp_path: Path) -> None:
    store = shutil.copytree(grown, tmp_path / "store")
    last = max((store / "growth").glob("0*"))
    for file in (last, store / "growth" / "index"):
        shutil.rmtree(file)
    lines = (store / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (store / "manifest.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    grow(config_of(corpus, store))
    assert content_of(store) == content_of(grown)


def test_new_documents_are_added_to_a_finished_store(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web, books = config_of(corpus, tmp_path / "store").sources
    store = build(config_of(corpus, tmp_path / "store", sources=[web]))
    base = texts_of(store)
    shards = store.shards()
    with pytest.raises(ConfigError, match="names that the build did not use: web"):
        grow(config_of(corpus, store.path))
    # The old text is not read again: only batches with candidates are, and here there are none.
    for file in (store.path / "stages" / "clean").glob("*.parquet"):
        assert file.stat().st_size
    added = grow(config_of(corpus, store.path, sources=[books]))
    added.check()
    assert added.shards()[: len(shards)] == shards
    assert added.sources == ("web", "books")
    texts = texts_of(added)
    assert base.items() <= texts.items()
    came = records(corpus)
    clusters = [
        row for name in ("", "growth/") for row in pq.read_table(store.path / f"{name}clusters.parquet").to_pylist()
    ]
    assert_exact(texts, came, clusters)
    # A copy of a document of the build comes later, under another id: it goes, and the table says for whom.
    (tmp_path / "late.jsonl").write_text(json.dumps({"id": "late", "text": base["web-1"] + " once more"}) + "\n")
    late = SourceConfig(name="late", path=str(tmp_path / "late.jsonl"))
    grow(config_of(corpus, store.path, sources=[books, late]))
    row = pq.read_table(store.path / "growth" / "clusters.parquet").to_pylist()[-1]
    assert (row["removed_id"], row["kept_source"], row["stage"]) == ("late", "web", "near")
    twin = shingles_of(texts[row["kept_id"]])
    assert row["jaccard"] == pytest.approx(jaccard_of(shingles_of(base["web-1"] + " once more"), twin))
    assert Store.open(store.path).ended


def test_files_that_come_later_are_read_and_repeated_ids_stay_apart(corpus: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "in"
    inbox.mkdir()
    source = SourceConfig(name="web", path=str(inbox))
    config = config_of(corpus, tmp_path / "store", sources=[source])
    texts = [f"{text} {number}" for number, text in enumerate(records(corpus).values()) if len(text) > 300][:20]
    (inbox / "b.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": t}) + "\n" for n, t in enumerate(texts[:10]))
    )
    grow(config)
    (inbox / "a.jsonl").write_text(
        "".join(json.dumps({"id": str(n), "text": t}) + "\n" for n, t in enumerate(texts[10:]))
    )
    store = grow(config)
    found = texts_of(store)
    assert {"0", "9"} & set(found)
    assert any("~" in identifier for identifier in found)
    assert set(found.values()) <= set(texts)
    (inbox / "c.jsonl").write_text(json.dumps({"id": "x", "text": "a late one " * 30}) + "\n")
    waiting = replace(config, grow=replace(config.grow, idle_seconds=3.0))
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "y", "text": "something else that is new " * 20}) + "\n")
    portions = tmp_path / "store" / "growth"
    before = len(list(portions.glob("0*")))

    def comes_when_the_one_before_is_taken() -> None:
        while len(list(portions.glob("0*"))) == before:
            time.sleep(0.05)
        (tmp_path / "d.jsonl").rename(inbox / "d.jsonl")

    threading.Thread(target=comes_when_the_one_before_is_taken, daemon=True).start()
    assert {"x", "y"} <= set(texts_of(grow(waiting)))


def test_a_changed_configuration_or_a_missing_file_is_refused(corpus: Path, grown: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"begun to grow under another configuration \(changed: split\)"):
        grow(config_of(corpus, grown, validation=ValidationConfig(share=0.2)))
    store = shutil.copytree(grown, tmp_path / "store")
    for portion in sorted((store / "growth").glob("0*"))[2:]:
        shutil.rmtree(portion)
    shutil.rmtree(store / "growth" / "index")
    (tmp_path / "web.jsonl.gz").write_bytes((corpus / "web.jsonl.gz").read_bytes() + b"\0" * 10)
    changed = [SourceConfig(name="web", path=str(tmp_path / "web.jsonl.gz")), config_of(corpus, store).sources[1]]
    with pytest.raises(UserError, match="documents of it were taken, and is"):
        grow(config_of(corpus, store, sources=changed))


def test_bloom_filters_hold_the_memory_they_state(corpus: Path, tmp_path: Path) -> None:
    settings = GrowConfig(portion_bytes=8_000, index=IndexKind.bloom, bloom_documents=1000)
    store = grow(config_of(corpus, tmp_path / "store", grow=settings))
    verified = texts_of(grow(config_of(corpus, tmp_path / "verified")))
    assert set(texts_of(store)) <= set(verified)
    assert len(texts_of(store)) > 0.9 * len(verified)
    bands = 20
    bits = 1000 * -np.log(1e-4 / bands) / np.log(2) ** 2
    size = (tmp_path / "store" / "growth" / "index" / "bloom" / "bits.bin").stat().st_size
    assert size == pytest.approx(bands * bits / 8, rel=0.01)


def test_full_bloom_filters_err_as_often_as_they_say(tmp_path: Path) -> None:
    settings = GrowConfig(index=IndexKind.bloom, bloom_documents=2000, bloom_false_share=0.02)
    index = Index(tmp_path, settings, bands=5)
    random_bands = np.random.default_rng(1).integers(0, 2**64, (5, 22_000), dtype=np.uint64)
    old, new = random_bands[:, :2000], random_bands[:, 2000:]
    index.add(0, old[0], np.stack([old[0], old[1]], axis=1), old, rows=range(2000))
    assert index.seen(np.ascontiguousarray(old)).all()
    share = index.seen(np.ascontiguousarray(new)).mean()
    assert share == pytest.approx(index.filled, rel=0.25)
    assert share == pytest.approx(0.02, rel=0.35)
    index.close()


def test_training_follows_a_growing_store(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A loader that starts with the first shard hands out what one hands out that comes when all is done."""
    config = config_of(corpus, tmp_path / "store")
    arguments: dict[str, Any] = {
        "mixture": {"web": 0.5, "books": 0.5},
        "sequence_length": 64,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 3,
    }
    job = threading.Thread(target=grow, args=(config,))
    job.start()
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        if (tmp_path / "store" / "manifest.jsonl").exists() and Store.open(tmp_path / "store", follow=True).sources:
            break
        time.sleep(0.01)
    plan = Plan(following=Following(limit_seconds=120, look_seconds=0.02))
    own = Loader(Store.open(tmp_path / "store", follow=True), **arguments, plan=plan)
    batches = [own.next_batch() for _ in range(300)]
    job.join(timeout=120)
    finished = Loader(Store.open(tmp_path / "store"), **arguments)
    assert all(torch.equal(batch["tokens"], finished.next_batch()["tokens"]) for batch in batches)
    assert own.state_dict() == finished.state_dict()


def test_a_store_that_stands_still_ends_the_wait_with_a_sentence(corpus: Path, grown: Path, tmp_path: Path) -> None:
    store = shutil.copytree(grown, tmp_path / "store")
    lines = (store / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    (store / "manifest.jsonl").write_bytes(b"".join(lines[:4]))
    plan = Plan(following=Following(limit_seconds=0.3, look_seconds=0.05))
    arguments: dict[str, Any] = {
        "sequence_length": 64,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "dp_rank": 0,
        "dp_size": 1,
    }
    own = Loader(Store.open(store, follow=True), mixture={"web": 1}, seed=3, plan=plan, **arguments)
    with pytest.raises(UserError, match=r"has sealed nothing more of web for 0\.3 s \(data\.follow_seconds\)"):
        _drain(own)
    with pytest.raises(UserError, match="is not finished"):
        Store.open(store)
    with pytest.raises(ConfigError, match=r"data\.mixture.*does not follow from its size"):
        Loader(Store.open(store, follow=True), mixture={}, seed=3, plan=plan, **arguments)


def _drain(own: Loader) -> None:
    for _ in range(1000):
        own.next_batch()
