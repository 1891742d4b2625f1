"""The corpus of the benchmarks: real text that lies about on this machine.

    python benchmarks/texts.py DIRECTORY BYTES

Documents are the real corpora kept beside the repository, the standard library and the installed packages (sources,
headers, documentation): half a gigabyte of prose and code, English and Chinese, with the near-duplicates that such
files have by nature. They are ordered by a hash of their names, so the first 28 MB are like the first 448.
"""

import gzip
import json
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import orjson
import xxhash

CORPORA = Path(__file__).parents[2] / "shared" / "corpora"
ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".c", ".cpp", ".cu", ".cuh")
_FILE_BYTES = 16_000_000
_LARGEST_BYTES = 4_000_000
UNSPACED = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af"
"""Characters that are tokens by themselves, for a character class."""
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")


def tokens_of(text: str) -> list[str]:
    """One CJK, kana or hangul character, else a run of other word characters, of the NFC, lower-cased text."""
    return _TOKEN.findall(unicodedata.normalize("NFC", text).lower())


def _places() -> Iterator[tuple[str, Path, int | None]]:
    """(name, file, line) of every document; the line is None where the whole file is one."""
    for file in sorted(CORPORA.glob("*.jsonl.gz")):
        with gzip.open(file, "rb") as opened:
            count = sum(1 for _ in opened)
        yield from ((f"{file.name}:{line}", file, line) for line in range(count))
    packages = (Path(place) for place in sys.path if place.endswith("site-packages"))
    for number, root in enumerate((Path(sysconfig.get_path("stdlib")), *packages)):
        for file in root.rglob("*"):
            inside = "site-packages" in file.relative_to(root).parts
            if file.suffix in ENDINGS and not inside and file.is_file() and file.stat().st_size <= _LARGEST_BYTES:
                yield f"{number}/{file.relative_to(root)}", file, None


def _texts() -> Iterator[tuple[str, str]]:
    """(name, text) in the order of the names' hashes; what is no UTF-8 or has control characters is left out."""
    held: dict[Path, list[bytes]] = {}
    for name, file, line in sorted(_places(), key=lambda place: xxhash.xxh3_64_intdigest(place[0].encode())):
        if line is not None and file not in held:
            with gzip.open(file, "rb") as opened:
                held[file] = opened.readlines()
        try:
            text = file.read_bytes().decode() if line is None else json.loads(held[file][line])["text"]
        except UnicodeDecodeError:
            continue
        if text and not text.isspace() and not _CONTROL.search(text):
            yield name, text


def write_corpus(directory: Path, size: int) -> dict[str, int]:
    """Writes jsonl files with about `size` bytes of text; the documents and bytes that it came to."""
    directory.mkdir(parents=True)
    documents = total = 0
    for name, text in _texts():
        if total >= size:
            break
        with (directory / f"{total // _FILE_BYTES:03d}.jsonl").open("ab") as file:
            file.write(orjson.dumps({"id": name, "text": text}) + b"\n")
        documents, total = documents + 1, total + len(text.encode())
    return {"documents": documents, "text_bytes": total}


def records(directory: Path) -> Iterator[tuple[bytes, str, str]]:
    """(line, id, text) of every document of a directory of jsonl files."""
    for file in sorted(directory.rglob("*.jsonl")):
        with file.open("rb") as opened:
            for line in opened:
                record = orjson.loads(line)
                yield line, record["id"], record["text"]


if __name__ == "__main__":
    print(json.dumps(write_corpus(Path(sys.argv[1]), int(sys.argv[2]))))
