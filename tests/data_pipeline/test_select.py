"""Deduplication and decontamination alone: what comes out is a part of what went in, byte by byte."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.config import DecontaminateConfig, NearDedupConfig, SourceConfig, StagesConfig
from data_pipeline.select import select
from parallel.common.errors import UserError

BODY = " ".join(f"word{number}" for number in range(60))
RECORDS = [
    {"id": "a", "text": BODY, "meta": {"url": "x", "tags": [1, 2]}},
    {"text": f"Nothing like it, {'quite other words stand here ' * 3}", "score": 0.5},
    {"id": "c", "text": f"{BODY} and more", "score": None},
    {"id": "d", "text": BODY},
    {"id": "e", "other": 1},
    {"id": "f", "text": "  "},
    {"id": "g", "text": "Short, but kept."},
]
KEPT = [1, 2, 6]
"""Of the three that resemble each other the longest stays; records without a text go."""


def as_lines(records: list[dict]) -> list[bytes]:
    """Lines as no JSON library writes them: they must come out as they are."""
    return [json.dumps(record, separators=(" ,", " : ")).encode() + b" " for record in records]


def sources(*paths: Path) -> list[SourceConfig]:
    return [SourceConfig(name=f"s{number}", path=str(path)) for number, path in enumerate(paths)]


STAGES = StagesConfig(max_dropped_share=1.0)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_kept_lines_come_out_as_they_were(tmp_path: Path, ending: str) -> None:
    lines = as_lines(RECORDS)
    raw = b"\n".join([*lines[:2], b"", *lines[2:], b"{broken"])
    content = {"jsonl": raw, "jsonl.gz": gzip.compress(raw), "jsonl.zst": zstandard.compress(raw)}[ending]
    (tmp_path / f"in.{ending}").write_bytes(content)
    report = select(sources(tmp_path / f"in.{ending}"), tmp_path / "out", STAGES)
    out = (tmp_path / "out" / f"in.{ending}").read_bytes()
    if ending.endswith("gz"):
        out = gzip.decompress(out)
    elif ending.endswith("zst"):
        out = zstandard.ZstdDecompressor().decompressobj().decompress(out)
    assert out == b"".join(lines[index] + b"\n" for index in KEPT)
    assert report["stages"]["read"]["counts"]["sources"]["s0"]["dropped"]["empty"]["documents"] == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clusters.parquet", f"in.{ending}", "report.json"]
    twins = [
        (row["removed_id"], row["kept_id"], row["stage"])
        for row in pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    ]
    assert twins == [("a", "c", "near"), ("d", "c", "exact")]


def test_parquet_keeps_every_column_and_its_row_groups(tmp_path: Path) -> None:
    texts = [record.get("text") for record in RECORDS] * 2
    columns = {"n": list(range(14)), "text": texts, "nested": [{"a": [n]} for n in range(14)]}
    table = pa.table(columns).replace_schema_metadata({"origin": "here"})
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "x.parquet", row_group_size=5, compression="zstd")
    select(sources(tmp_path / "in"), tmp_path / "out", STAGES)
    out = pq.ParquetFile(tmp_path / "out" / "x.parquet")
    assert out.schema_arrow.equals(pq.ParquetFile(tmp_path / "in" / "x.parquet").schema_arrow, check_metadata=True)
    # Of equal texts the smallest id stays, and 13 stands before 6 as text.
    assert out.metadata.row_group(0).column(0).compression == "ZSTD"
    assert out.read().to_pylist() == table.take([1, 2, 13]).to_pylist()


def test_exact_only_and_several_inputs(tmp_path: Path) -> None:
    for name, records in (("new", RECORDS[:3]), ("old", RECORDS[2:])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(as_lines(records)))
    stages = StagesConfig(near_dedup=NearDedupConfig(enabled=False), max_dropped_share=1.0)
    select(sources(tmp_path / "new.jsonl", tmp_path / "old.jsonl"), tmp_path / "out", stages)
    assert [json.loads(line).get("id") for line in (tmp_path / "out/s0/new.jsonl").read_text().splitlines()] == [
        "a",
        None,
        "c",
    ]
    assert [json.loads(line)["id"] for line in (tmp_path / "out/s1/old.jsonl").read_text().splitlines()] == ["g"]
    rows = pq.read_table(tmp_path / "out" / "clusters.parquet").to_pylist()
    assert [(row["removed_id"], row["removed_source"], row["kept_source"]) for row in rows] == [
        ("c", "s1", "s0"),
        ("d", "s1", "s0"),
    ]


def test_decontamination_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(as_lines(RECORDS)))
    (tmp_path / "eval.txt").write_text(" ".join(BODY.split()[5:25]))
    stages = StagesConfig(
        exact_dedup=False,
        near_dedup=NearDedupConfig(enabled=False),
        decontaminate=DecontaminateConfig(files=(str(tmp_path / "eval.txt"),)),
        max_dropped_share=1.0,
    )
    select(sources(tmp_path / "in.jsonl"), tmp_path / "out", stages)
    assert len((tmp_path / "out" / "in.jsonl").read_bytes().splitlines()) == 2
    assert pq.read_table(tmp_path / "out" / "hits.parquet")["id"].to_pylist() == ["a", "c", "d"]


def test_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(as_lines(RECORDS)))
    with pytest.raises(UserError, match="neither jsonl nor parquet"):
        select(sources(tmp_path / "a.txt"), tmp_path / "out", STAGES)
    with pytest.raises(UserError, match=r"holds other files \(a\.jsonl\)"):
        select(sources(tmp_path / "a.jsonl"), tmp_path, STAGES)
