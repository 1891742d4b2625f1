"""Hugging Face datasets as sources: the rows of a split in order, what is dropped, what is refused, what is noticed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars

from data_pipeline.build import build
from data_pipeline.config import CleanConfig, DataConfig, SourceConfig, SourceFormat, StagesConfig, TokenizerConfig
from data_pipeline.read import documents, expected_bytes, find_source
from data_pipeline.reading import Reading
from data_pipeline.report import Tally, dropped
from data_pipeline.sealed import settings_of, state_of
from data_pipeline.sources import fingerprint_of_files
from parallel.common.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
README = """\
---
configs:
- config_name: poems
  default: true
  data_files:
  - split: train
    path: [b.jsonl, a.jsonl]
  - split: held
    path: held.jsonl
- config_name: prose
  data_files:
  - split: train
    path: held.jsonl
---
"""


def source(path: Any, **fields: Any) -> SourceConfig:
    return SourceConfig(name="web", path=str(path), format=SourceFormat.datasets, **fields)


def read(path: Any, **fields: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(id, text) of every document, and what was dropped."""
    config = source(path, **fields)
    reading = Reading(config=config, tally=Tally(["web"]))
    found = [(identifier, text) for identifier, text, _ in documents(find_source(config), reading)]
    return found, dropped(reading.tally.to_json())


def rows(count: int, word: str = "text") -> list[dict[str, Any]]:
    return [{"id": f"{word}-{number}", "text": f"{word} {number} 中文 é", "n": number} for number in range(count)]


def pairs(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(record["id"], record["text"]) for record in records]


def hub_layout(root: Path, records: list[dict[str, Any]], files: int = 3) -> Path:
    """A directory as the Hub has them: data/SPLIT-NNNNN-of-NNNNN.parquet."""
    (root / "data").mkdir(parents=True)
    share = -(-len(records) // files)
    for number in range(files):
        part = pa.Table.from_pylist(records[number * share : (number + 1) * share])
        pq.write_table(part, root / "data" / f"train-{number:05d}-of-{files:05d}.parquet", row_group_size=100)
    pq.write_table(pa.Table.from_pylist(rows(5, "test")), root / "data" / "test-00000-of-00001.parquet")
    return root


def jsonl_layout(root: Path) -> Path:
    """A directory whose README.md says which files make which split of which subset."""
    root.mkdir()
    (root / "README.md").write_text(README)
    for name, word in (("a", "first"), ("b", "second"), ("held", "held")):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rows(4, word)))
    return root


def saved(root: Path) -> Path:
    disable_progress_bars()
    DatasetDict({name: Dataset.from_list(rows(700, name)) for name in ("train", "test")}).save_to_disk(root)
    return root


def test_the_rows_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    hub = hub_layout(tmp_path / "hub", rows(1000))
    assert read(hub) == (pairs(rows(1000)), {})
    assert read(hub, split="test")[0] == pairs(rows(5, "test"))
    jsonl = jsonl_layout(tmp_path / "jsonl")
    assert read(jsonl)[0] == pairs([*rows(4, "second"), *rows(4, "first")])
    assert read(jsonl, split="held")[0] == read(jsonl, subset="prose")[0] == pairs(rows(4, "held"))
    disk = saved(tmp_path / "disk")
    assert read(disk)[0] == pairs(rows(700, "train"))
    assert read(disk, split="test")[0] == pairs(rows(700, "test"))
    Dataset.from_list(rows(3)).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one", id_field="none")[0] == [
        (f"web/train:{number}", record["text"]) for number, record in enumerate(rows(3))
    ]


def test_what_has_no_text_is_counted_by_reason(tmp_path: Path) -> None:
    texts = ["one", None, " \n", "", "two"]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"body": texts, "id": [7, 8, 9, 10, None]}), tmp_path / "in" / "train.parquet")
    assert read(tmp_path / "in", text_field="body") == (
        [("7", "one"), ("web/train:4", "two")],
        {"empty": 2, "no text field": 1},
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "train.jsonl").write_text('{"text": "one", "n": 1}\n{"n": 2}\n')
    assert read(tmp_path / "a") == ([("web/train:0", "one")], {"no text field": 1})
    pq.write_table(pa.table({"text": pa.array([b"bin \xff"])}), tmp_path / "b" / "train.parquet")
    assert read(tmp_path / "b")[0] == [("web/train:0", "bin \ufffd")]


def test_a_limit_takes_the_front_of_the_split(tmp_path: Path) -> None:
    hub = hub_layout(tmp_path / "hub", [{"text": "y" * 100} for _ in range(900)])
    config = source(hub, limit_bytes=35_050)
    reading = Reading(config=config, tally=Tally(["web"]))
    files = find_source(config)
    found = [identifier for identifier, _, _ in documents(files, reading)]
    assert found == [f"web/train:{number}" for number in range(350)]
    assert reading.left_out_files == 0
    assert 0 < expected_bytes([files]) <= 35_050


def test_what_is_not_there_is_said_with_what_would_be_right(tmp_path: Path) -> None:
    hub, jsonl, disk = hub_layout(tmp_path / "hub", rows(9)), jsonl_layout(tmp_path / "jsonl"), saved(tmp_path / "disk")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"PAR1 this is not a parquet file")
    Dataset.from_list(rows(2)).save_to_disk(tmp_path / "plain")
    cases: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (hub, {"split": "validation"}, "has no split 'validation': set split to one of train, test"),
        (disk, {"split": "held"}, "has no split 'held': set split to one of train, test"),
        (hub, {"text_field": "body"}, "no column 'body': set text_field to one of id, text, n"),
        (disk, {"text_field": "n"}, r"the column 'n' .* is int64: expected text"),
        (jsonl, {"subset": "plays"}, "has no subset 'plays': set subset to one of poems, prose"),
        (disk, {"subset": "poems"}, "leave subset out"),
        ("somebody/no-such-dataset", {}, r"somebody/no-such-dataset is no directory here, and the Hub .*: give a dir"),
        (tmp_path / "none", {}, r"no dataset .*none: expected a directory .* or a name on the Hub"),
        (tmp_path / "empty", {}, "holds no data files"),
        (tmp_path / "broken", {}, "broken cannot be opened"),
        (jsonl / "a.jsonl", {}, "is a file, but format=datasets reads a directory"),
    )
    for path, fields, said in cases:
        with pytest.raises(UserError, match=rf"^data source web: .*{said}[^\n]*$"):
            read(path, **fields)
    (jsonl / "README.md").write_text(README.replace("  default: true\n", ""))
    with pytest.raises(UserError, match="has several subsets: set subset to one of poems, prose"):
        read(jsonl)


def test_a_change_is_noticed_and_a_copy_is_none(tmp_path: Path) -> None:
    for make in (lambda root: hub_layout(root, rows(30)), jsonl_layout, saved):
        root = make(tmp_path / "made")
        config = source(root)
        before = find_source(config)
        assert fingerprint_of_files([before]) == fingerprint_of_files([find_source(config)])
        file = Path(before.files[0].path)
        os.utime(file, ns=(1, 1))
        touched = find_source(config)
        assert state_of([touched]) != state_of([before])
        assert fingerprint_of_files([touched]) == fingerprint_of_files([before])
        with pytest.raises(UserError, match="changed while it was read"):
            list(documents(before, Reading(config=config, tally=Tally(["web"]))))
        root.rename(tmp_path / f"moved-{make.__name__}")
        moved = find_source(source(tmp_path / f"moved-{make.__name__}"))
        assert fingerprint_of_files([moved]) == fingerprint_of_files([before])
    (tmp_path / "moved-jsonl_layout" / "README.md").write_text(README.replace("[b.jsonl, a.jsonl]", "a.jsonl"))
    moved = find_source(source(tmp_path / "moved-jsonl_layout"))
    assert [file.name for file in moved.files] == ["a.jsonl"]


def test_a_build_reads_a_dataset_and_finds_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def config(split: str) -> DataConfig:
        return DataConfig(
            sources=[source(tmp_path / "hub", split=split)],
            store=str(tmp_path / "store"),
            stages=StagesConfig(clean=CleanConfig(min_characters=1)),
            tokenizer=TokenizerConfig(vocabulary_size=384),
        )

    hub_layout(tmp_path / "hub", rows(300))
    store = build(config("train"))
    assert sum(shard.documents for shard in store.shards()) > 0
    assert "300 documents" in capsys.readouterr().out
    build(config("train"))
    assert "(as before)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"another configuration \(changed: the input files, read\)"):
        build(config("test"))


def test_fields_that_mean_nothing_are_refused() -> None:
    wrong = (
        (SourceConfig(name="a", path=["x", "y"], format=SourceFormat.datasets), "sources.0.path"),
        (SourceConfig(name="a", path="x", format=SourceFormat.datasets, include=("*.py",)), "sources.0.include"),
        (SourceConfig(name="a", path="x", subset="poems"), "sources.0.subset"),
        (SourceConfig(name="a", path="x", split="test"), "sources.0.split"),
    )
    for config, key in wrong:
        with pytest.raises(ConfigError, match=key):
            build(DataConfig(sources=[config], store="none"))
    plain = DataConfig(sources=[SourceConfig(name="a", path="x")], store="none")
    assert not {"split", "subset"} & set(settings_of(plain)["read"][0])


def test_nothing_is_imported_that_is_not_used(tmp_path: Path) -> None:
    """jsonl in, jsonl out: none of the libraries that cost more than the work."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a text that is long enough"}) + "\n")
    command = f"""
import sys
from launcher.data import main
main(["dedup", {str(tmp_path / "a.jsonl")!r}, "--output", {str(tmp_path / "out")!r}])
print(*{{"datasets", "ray", "trafilatura", "warcio", "huggingface_hub", "torch"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-P", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
