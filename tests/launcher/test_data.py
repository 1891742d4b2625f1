"""The words of `bloomery data`, called as a user calls them."""

import json
from pathlib import Path

import pytest

from launcher.cli import main

WORDS = (
    "build", "grow", "dedup", "decontaminate", "train-tokenizer", "tokenize", "stats", "inspect", "check", "report",
)  # fmt: skip


def write(path: Path, count: int) -> Path:
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(f"{word}{number}" for word in ("iron", "ore", "slag", "coal", "bloom", "hammer")) * 5
            file.write(
                json.dumps({"id": f"{path.stem}-{number % 20}", "text": text.replace(str(number), str(number % 20))})
                + "\n"
            )
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    web = write(root / "web.jsonl", 20)
    assert (
        main(["data", "train-tokenizer", str(web), "--vocabulary-size", "384", "--output", str(root / "t.json")]) == 0
    )
    command = ["data", "tokenize", str(web), "--tokenizer", str(root / "t.json"), "--output", str(root / "store")]
    assert main([*command, "--validation-share", "0.2"]) == 0
    return root / "store"


@pytest.mark.parametrize("word", WORDS)
def test_every_word_teaches(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["data", word, "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    assert f"bloomery data {word}" in printed
    assert word == "check" or "example" in printed


def test_stats_count_what_the_store_holds(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(store), "--json", str(tmp_path / "s.json")]) == 0
    assert "tokens in a document" in capsys.readouterr().out
    found = json.loads((tmp_path / "s.json").read_text())["sources"]["web"]
    assert sum(facts["documents"] for facts in found.values()) == 20
    assert all(sum(facts["histogram"]) == facts["documents"] for facts in found.values())


def test_a_document_is_shown_with_its_origin_and_tokens(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(store), "--document", "web-7"]) == 0
    by_id = capsys.readouterr().out
    assert "== web-7   web, " in by_id
    assert "iron7 ore7 slag7" in by_id
    assert "<|endofdocument|>" in by_id.splitlines()[-1]
    assert main(["data", "inspect", str(store), "--grep", "slag7 coal7"]) == 0
    assert capsys.readouterr().out == by_id
    assert main(["data", "inspect", str(store), "--sample", "3"]) == 0
    assert 1 <= capsys.readouterr().out.count("== web-") <= 3


def test_what_is_not_there_is_said(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(store), "--document", "none"]) == 2
    assert "no document with the id 'none'" in capsys.readouterr().err
    assert main(["data", "inspect", str(store), "--grep", "gold"]) == 2
    assert main(["data", "stats", str(store / "none")]) == 2
    assert "there is no token store" in capsys.readouterr().err


def test_the_page_has_every_part(store: Path) -> None:
    before = (store / "report.html").read_bytes()
    (store / "report.html").unlink()
    assert main(["data", "report", str(store)]) == 0
    assert (store / "report.html").read_bytes() == before
    for part in (b"Corpus", b"Tokens", b"Duplicates by source", b"Samples of what was dropped"):
        assert b"<h2>" + part in before
    assert main(["data", "check", str(store)]) == 0


def test_dedup_and_decontaminate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = write(tmp_path / "web.jsonl", 40)
    assert main(["data", "dedup", str(twice), "--output", str(tmp_path / "out"), "--exact-only"]) == 0
    assert "out: 20 documents" in capsys.readouterr().out
    assert len((tmp_path / "out" / "web.jsonl").read_text().splitlines()) == 20
    (tmp_path / "eval.txt").write_text(json.loads(twice.read_text().splitlines()[3])["text"])
    command = ["data", "decontaminate", str(tmp_path / "out"), "--against", str(tmp_path / "eval.txt"), "--output"]
    assert main([*command, str(tmp_path / "clean")]) == 0
    assert len((tmp_path / "clean" / "web.jsonl").read_text().splitlines()) == 19
    assert main([*command, str(tmp_path / "clean")]) == 2
    assert "holds other files" in capsys.readouterr().err
