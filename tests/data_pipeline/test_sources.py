"""Which files a source is made of, and what is read from them: every format, every kind of damage."""

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.config import SourceConfig, SourceFormat
from data_pipeline.read import digest_of, documents, read_sources
from data_pipeline.reading import Reading
from data_pipeline.report import Tally, dropped
from data_pipeline.sources import find_files
from parallel.common.errors import UserError


class Silent:
    """A meter that nobody sees."""

    def advance(self, amount: int) -> None:
        pass


def read(path: Any, **fields: Any) -> tuple[list[tuple[str, str]], dict[str, int], Reading]:
    """(id, text) of every document, what was dropped, and the other counts."""
    config = SourceConfig(name="web", path=str(path) if isinstance(path, Path) else path, **fields)
    reading = Reading(config=config, tally=Tally(["web"]))
    found = [(identifier, text) for identifier, text, _ in documents(find_files(config), reading)]
    return found, dropped(reading.tally.to_json()), reading


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_every_format_and_compression_gives_the_same_documents(tmp_path: Path) -> None:
    records = [{"id": f"d{number}", "text": f"text {number} 中文 é"} for number in range(50)]
    expected = [(record["id"], record["text"]) for record in records]
    raw = lines(*records)
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(raw[:500]) + gzip.compress(raw[500:]))
    (tmp_path / "c.ndjson.zst").write_bytes(zstandard.compress(raw[:500]) + zstandard.compress(raw[500:]))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "d.parquet", row_group_size=7)
    for name in ("a.jsonl", "b.jsonl.gz", "c.ndjson.zst", "d.parquet"):
        assert read(tmp_path / name)[0] == expected, name


def test_a_document_without_an_id_is_named_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}, {"text": "two", "id": 7}, {"text": "x", "id": ""}))
    pq.write_table(pa.table({"text": ["p", "q"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("plain")
    assert [identifier for identifier, _ in read(tmp_path)[0]] == [
        "web/a.jsonl:1",
        "7",
        "web/a.jsonl:3",
        "web/b.parquet:0",
        "web/b.parquet:1",
        "web/c.txt",
    ]


def test_what_cannot_be_read_is_counted_by_reason(tmp_path: Path) -> None:
    good = lines({"text": "good"})
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "torn\n' + lines({"body": "x"}, {"text": None}, {"text": 3}, [1], {"text": " \n "}) + b"\n" + good
    )
    found, lost, reading = read(tmp_path / "a.jsonl")
    assert [text for _, text in found] == ["good"]
    assert lost == {"no text field": 2, "not valid JSON": 2, "empty": 1, "text field is not a string": 1}
    assert reading.fields_seen == {"body", "text"}


def test_undecodable_bytes_are_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "caf\xe9 \xff"}\n{"text": "half \\ud800 pair"}\n{"text": "\xef\xbf\xbd"}\n'
    )
    (tmp_path / "b.txt").write_bytes(b"latin \xe9")
    pq.write_table(pa.table({"text": pa.array([b"bin \xff", b"fine"])}), tmp_path / "c.parquet")
    found, lost, reading = read(tmp_path)
    assert not lost
    assert found[0][1] == "caf\ufffd \ufffd"
    assert "half" in found[1][1]
    assert found[1][1].encode()
    assert [text for _, text in found][2:] == ["\ufffd", "latin \ufffd", "bin \ufffd", "fine"]
    assert reading.replaced_documents == 4
    assert reading.replaced_characters >= 5


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
def test_a_cut_off_file_is_refused_by_name(tmp_path: Path, ending: str, share: float) -> None:
    raw = lines(*({"text": os.urandom(40).hex()} for _ in range(200)))
    whole = gzip.compress(raw) if ending == "gz" else zstandard.compress(raw)
    file = tmp_path / f"broken.jsonl.{ending}"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=rf"broken\.jsonl\.{ending} .*cut off"):
        read(file)


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "no.parquet").write_bytes(b"PAR1 this is not a parquet file")
    (tmp_path / "no.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "wide.txt").write_bytes("text".encode("utf-16"))
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "other.parquet")
    for name, said in (
        ("no.parquet", r"no\.parquet cannot be read"),
        ("no.jsonl.gz", r"no\.jsonl\.gz cannot be read"),
        ("wide.txt", "UTF-16"),
        ("other.parquet", "no column 'text': set text_field to one of body, n"),
    ):
        with pytest.raises(UserError, match=said):
            read(tmp_path / name)
    with pytest.raises(UserError, match=r"the column 'n' .* is int64: expected text"):
        read(tmp_path / "other.parquet", text_field="n")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines({"text": "one"}, {"text": "two"}))
    config = SourceConfig(name="web", path=str(file))
    files = find_files(config)
    time.sleep(0.01)
    file.write_bytes(lines({"text": "one"}, {"text": "two"}, {"text": "three"}))
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        list(documents(files, Reading(config=config, tally=Tally(["web"]))))


def test_missing_files_and_unknown_formats_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "none.jsonl", "there is no file or directory"),
        (tmp_path / "*.jsonl", "no file matches"),
        (tmp_path / "a.csv", "format of .* is not clear from its name"),
        (tmp_path / "empty", "holds no files"),
        (tmp_path, "1 of other names"),
    ):
        with pytest.raises(UserError, match=said):
            read(path)
    with pytest.raises(UserError, match="format=tree reads directories"):
        read(tmp_path / "a.csv", format=SourceFormat.tree)


def test_a_long_txt_file_is_cut_at_empty_lines_without_loss(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {number}, words é and 中.\n{'more ' * (number % 9)}\n\n" for number in range(400))
    (tmp_path / "a.txt").write_text(text)
    found = read(tmp_path / "a.txt", document_bytes=2048)[0]
    assert "".join(piece for _, piece in found) == text
    assert all(len(piece.encode()) <= 2048 and piece.startswith("Paragraph") for _, piece in found)
    assert [identifier for identifier, _ in found[:2]] == ["web/a.txt:1", "web/a.txt:2"]
    assert len(read(tmp_path / "a.txt", document_bytes=0)[0]) == 1
    (tmp_path / "b.txt").write_text("中" * 3000)
    found = read(tmp_path / "b.txt", document_bytes=1024)
    assert "".join(piece for _, piece in found[0]) == "中" * 3000
    assert found[2].replaced_characters == 0


def make_tree(root: Path) -> None:
    for name in ("a/one.py", "a/b/two.py", "docs/read.md", "docs/LICENSE", "skip/three.py", ".git/x.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    (root / "a/binary.py").write_bytes(b"x\0y")


def test_a_tree_takes_text_files_and_follows_no_links(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    make_tree(root)
    (tmp_path / "outside.py").write_text("outside")
    (root / "link.py").symlink_to(tmp_path / "outside.py")
    (root / "loop").symlink_to(root)
    found, lost, _ = read(root, format=SourceFormat.tree, include=("*.py", "docs/*"), exclude=("skip/**",))
    assert [identifier for identifier, _ in found] == [
        "web/a/b/two.py",
        "web/a/one.py",
        "web/docs/LICENSE",
        "web/docs/read.md",
    ]
    assert lost == {"binary file": 1}
    both = read([str(root / "a"), str(root / "docs")], format=SourceFormat.tree, include=("**/*.py", "*.md"))[0]
    assert [identifier for identifier, _ in both] == ["web/a/b/two.py", "web/a/one.py", "web/docs/read.md"]


def test_a_file_name_that_is_not_utf_8_is_still_a_name(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.py")).write_text("text")
    assert read(tmp_path, format=SourceFormat.tree)[0] == [("web/caf\ufffd.py", "text")]


def test_globs_stay_inside_a_directory_unless_they_say_otherwise(tmp_path: Path) -> None:
    make_tree(tmp_path)
    for pattern, expected in (
        ("a/*.py", {"a/one.py"}),
        ("a/**", {"a/one.py", "a/b/two.py"}),
        ("**/b/*.py", {"a/b/two.py"}),
        ("[!t]*.py", {"a/one.py"}),
        ("t??.py", {"a/b/two.py"}),
    ):
        found = read(tmp_path, format=SourceFormat.tree, include=(pattern,))[0]
        assert {identifier.removeprefix("web/") for identifier, _ in found} == expected, pattern


def test_a_limit_takes_a_tree_from_everywhere_and_other_formats_from_the_front(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for letter in "abcdefghij":
        for number in range(20):
            (tree / letter).mkdir(parents=True, exist_ok=True)
            (tree / letter / f"{number}.txt").write_text("x" * 100)
    found = read(tree, format=SourceFormat.tree, limit_bytes=5_000)[0]
    assert len(found) == 50
    assert {identifier.split("/")[1] for identifier, _ in found} == set("abcdefghij")
    assert found == read(tree, format=SourceFormat.tree, limit_bytes=5_000)[0]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": "y" * 100} for _ in range(100))))
    assert [identifier for identifier, _ in read(tmp_path / "a.jsonl", limit_bytes=350)[0]] == [
        f"web/a.jsonl:{number}" for number in (1, 2, 3)
    ]


def test_repeated_ids_are_found_and_the_digest_is_of_the_documents(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(
        lines(*({"id": identifier, "text": f"t{number}"} for number, identifier in enumerate("abacaa")))
    )
    sources = [find_files(SourceConfig(name="web", path=str(tmp_path / "in")))]
    (tmp_path / "out").mkdir()
    outcome = read_sources(sources, tmp_path / "out", Silent())  # type: ignore[arg-type]
    assert outcome["repeated_ids"] == 3
    assert pq.read_table(tmp_path / "out" / "duplicate_ids.parquet").column("row").to_pylist() == [2, 4, 5]
    assert outcome["digest"] == digest_of(sources)


def test_a_line_of_a_hundred_megabytes_is_one_document(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "' + b"long line " * 10_000_000 + b'"}\n' + lines({"text": "short"}))
    assert [len(text) for _, text in read(tmp_path / "a.jsonl")[0]] == [100_000_000, 5]
