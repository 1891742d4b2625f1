"""Stretches of evaluation files in a corpus: found wherever they stand, counted, and nothing else is touched."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline.build import build
from data_pipeline.config import DataConfig, DecontaminateConfig, SourceConfig, StagesConfig, TokenizerConfig
from data_pipeline.decontaminate import read_evaluation
from parallel.common.errors import UserError
from tests.data_pipeline.test_dedup import shingles_of

QUESTION = "Which of the following metals was first worked by people in the valley of the two rivers, and when"
FILLER = " ".join(f"filler{number}" for number in range(30))


def write(path: Path, records: list[dict[str, object]]) -> Path:
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def config(tmp_path: Path, texts: list[str], settings: DecontaminateConfig) -> DataConfig:
    file = write(tmp_path / "web.jsonl", [{"id": f"d{n}", "text": f"{text} {n} " * 2} for n, text in enumerate(texts)])
    return DataConfig(
        sources=[SourceConfig(name="web", path=str(file))],
        store=str(tmp_path / "store"),
        stages=StagesConfig(decontaminate=settings),
        tokenizer=TokenizerConfig(vocabulary_size=384),
    )


def test_documents_with_a_stretch_are_dropped_and_reported(tmp_path: Path) -> None:
    words = QUESTION.split()
    chinese = "冶铁的炉子建在村子的边上工人们在太阳升起之前就开始干活"
    evaluation = write(
        tmp_path / "bench.jsonl.gz",
        [{"question": QUESTION, "choices": ["copper", "iron"]}, {"question": chinese}, {"question": "Too short?"}],
    )
    lines = tmp_path / "lines.txt"
    lines.write_text(
        "This line of another benchmark has more than thirteen words so that it can be looked for\nshort\n"
    )
    texts = [
        f"{FILLER} {QUESTION.upper()}! {FILLER}",  # whole, in capitals
        f"{FILLER} {'; '.join(words[2:15])} {FILLER} x",  # thirteen tokens, other punctuation
        f"{FILLER} {' '.join(words[2:14])} y {FILLER}",  # twelve
        f"{FILLER} {' '.join(words[:9])} of {' '.join(words[9:])} z",
        f"前面的话 {chinese} 后面的话",
        *(f"{FILLER} and number {number} alone" for number in range(8)),
    ]
    settings = DecontaminateConfig(files=(str(evaluation), str(lines)))
    store = build(config(tmp_path, texts, settings))
    report = json.loads((store.path / "report.json").read_text())["stages"]["decontaminate"]
    hits = pq.read_table(store.path / "stages" / "decontaminate" / "hits.parquet").to_pylist()
    assert [(hit["id"], hit["file"], hit["item"]) for hit in hits] == [
        ("d0", "bench.jsonl.gz", 1),
        ("d1", "bench.jsonl.gz", 1),
        ("d4", "bench.jsonl.gz", 2),
    ]
    assert report["evaluation"] == {
        "bench.jsonl.gz": {"items": 3, "too_short": 1, "met": 2, "documents": 3},
        "lines.txt": {"items": 2, "too_short": 1, "met": 0, "documents": 0},
    }
    kept = {
        identifier
        for shard in store.shards()
        for identifier in pq.read_table(store.path / f"{shard.stem}.docs.parquet")["id"].to_pylist()
    }
    twins = pq.read_table(store.path / "clusters.parquet").to_pylist()
    assert not kept & {"d0", "d1", "d4"}
    assert {row["kept_id"] for row in twins} <= kept
    assert kept | {row["removed_id"] for row in twins} == {f"d{n}" for n in range(len(texts))} - {"d0", "d1", "d4"}
    for number, text in enumerate(texts):
        shared = shingles_of(f"{text} {number} " * 2, 13) & (
            shingles_of(f"{QUESTION} copper iron", 13) | shingles_of(chinese, 13)
        )
        assert bool(shared) == (number in (0, 1, 4))


def test_evaluation_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.jsonl").write_text("{not json\n")
    (tmp_path / "c.txt").write_text("\n\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"a": "b"}\n' * 99)[:-9])
    for name, said in (
        ("none.jsonl", "there is no file"),
        ("a.json", "neither jsonl nor txt"),
        ("b.jsonl", "cannot be read"),
        ("c.txt", "holds no text"),
        ("d.jsonl.gz", "cannot be read"),
    ):
        wanted = config(tmp_path, [FILLER], DecontaminateConfig(files=(str(tmp_path / name),)))
        with pytest.raises(UserError, match=said) as told:
            build(wanted)
        assert name in str(told.value)


def test_another_evaluation_file_is_another_configuration(tmp_path: Path) -> None:
    evaluation = write(tmp_path / "bench.jsonl", [{"question": QUESTION}])
    settings = DecontaminateConfig(files=(str(evaluation),))
    wanted = config(tmp_path, [f"{FILLER} {n}" * 3 for n in range(4)], settings)
    build(wanted)
    write(evaluation, [{"question": QUESTION + " exactly"}])
    with pytest.raises(UserError, match="changed: decontaminate"):
        build(wanted)
    assert len(read_evaluation(replace(settings, ngram=5)).hashes) > len(read_evaluation(settings).hashes)
