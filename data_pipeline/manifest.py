"""The token store's manifest: one JSON object a line, append-only, each with a checksum of itself.

    {"kind": "header", "format": 1, "dtype", "tokenizer": {...}, "configuration", "checksum"}
    {"kind": "shard", "index", "source", "split", "documents", "tokens", "text_bytes", "files": {...}, "checksum"}
    {"kind": "end", "shards", "documents", "tokens", "text_bytes", "checksum"}

A store that grows after its end goes on behind that line and ends once more. A line that was torn by a kill is the
last one and does not count. Anything else that does not add up is damage, and refused: reading looks at every line's
checksum and every file's size.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import hash_bytes
from parallel.common.lines import JsonLines

FORMAT = 1
FILE_NAME = "manifest.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A sealed shard, as the manifest names it."""

    index: int
    source: str
    split: str
    documents: int
    tokens: int
    """Every document's end included."""
    text_bytes: int
    files: dict[str, dict[str, Any]]
    """{file name: {"bytes": size, "hash": xxh3-128}}."""
    window: bool = False
    """It was sealed by a growing store, and is a window of its own (data_pipeline.samples)."""

    @property
    def stem(self) -> str:
        return f"shard-{self.index:05d}"

    def record(self) -> dict[str, Any]:
        """Its line of the manifest, without the checksum."""
        return {
            "kind": "shard",
            "index": self.index,
            "source": self.source,
            "split": self.split,
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "files": self.files,
            **({"window": True} if self.window else {}),
        }


def checksum(record: dict[str, Any]) -> str:
    """Hash of a line's JSON without its checksum."""
    plain = {key: value for key, value in record.items() if key != "checksum"}
    return hash_bytes(json.dumps(plain, ensure_ascii=False, allow_nan=False).encode())


def totals(shards: Sequence[Shard]) -> dict[str, int]:
    """What the manifest's last line says of all shards."""
    return {
        "shards": len(shards),
        "documents": sum(shard.documents for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "text_bytes": sum(shard.text_bytes for shard in shards),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The whole lines of a manifest; a torn last line is not there."""

    header: dict[str, Any]
    shards: tuple[Shard, ...]
    ended: bool

    @classmethod
    def read(cls, path: Path) -> "Manifest | None":
        """Reads and verifies; None where not even the header was written.

        Raises:
            UserError: a line was changed, lines are missing, or a file is missing or of another size.
        """
        file = path / FILE_NAME
        try:
            records = list(JsonLines(file))
        except ValueError as error:
            raise UserError(f"{file} is damaged: a line in it is not JSON; build the store again") from error
        for number, record in enumerate(records, start=1):
            if not isinstance(record, dict) or record.get("checksum") != checksum(record):
                raise UserError(f"{file} is damaged: line {number} does not match its checksum; build the store again")
            del record["checksum"]
        if not records:
            return None
        header, *rest = records
        if header["kind"] != "header" or header["format"] != FORMAT:
            raise UserError(f"{file} has no header of store format {FORMAT}: build the store again")
        ended = bool(rest) and rest[-1]["kind"] == "end"
        ends = [(place, record) for place, record in enumerate(rest) if record["kind"] == "end"]
        rest = [record for record in rest if record["kind"] != "end"]
        if any(record["kind"] != "shard" or record["index"] != index for index, record in enumerate(rest)):
            raise UserError(f"{file} is damaged: its shards are not numbered in order; build the store again")
        shards = tuple(Shard(**{key: value for key, value in record.items() if key != "kind"}) for record in rest)
        for number, (place, end) in enumerate(ends):
            if end == {"kind": "end", **totals(shards[: place - number])}:
                continue
            raise UserError(f"{file} is damaged: its totals are not those of its shards; build the store again")
        for shard in shards:
            _verify_sizes(path, shard)
        return cls(header=header, shards=shards, ended=ended)


def _verify_sizes(path: Path, shard: Shard) -> None:
    for name, facts in shard.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {facts['bytes']}"
            raise UserError(f"{file} {found}: the store is damaged, build it again")
