"""Labelled examples in jsonl files to a store that `bloomery train` fine-tunes on.

An example is a line; what it is an example of follows from its fields (`kinds`), and is the same in all lines. What
cannot be used is counted by reason and said. Fine-tuning sets are small: they are read into memory. Which examples are
held out follows from a hash of the line, so the same line is held out in every store.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import xxhash

from data_pipeline.examples.encode import Encoder, Refused, kind_of, labels_of
from data_pipeline.examples.kinds import CHAT_TEMPLATE, Facts, Kind
from data_pipeline.places import open_stream
from data_pipeline.store import TRAINING, VALIDATION, Store, StoreWriter, TokenizedDocument
from data_pipeline.tokenizer import RESERVED, Tokenizer
from parallel.common.errors import UserError
from parallel.common.files import hash_bytes, hash_file

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_JSON = "not a JSON object"


def read_records(file: Path) -> list[dict[str, Any] | None]:
    """The lines of a jsonl file, plain, .gz or .zst; None for one that is no JSON object.

    Raises:
        UserError: it is missing or cannot be read.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}: expected a jsonl file, also .gz or .zst")
    try:
        with open_stream(str(file), _COMPRESSIONS.get(file.suffix)) as stream:
            lines = [line for line in stream.read().split(b"\n") if line.strip()]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    return [_record(line) for line in lines]


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def build_examples(
    files: Mapping[str, Path],
    root: Path,
    *,
    tokenizer: Tokenizer,
    chat_template: str | None,
    validation_share: float,
    held_out: Mapping[str, Path] | None = None,
    labels: Sequence[str] = (),
) -> tuple[Store, Facts, Counter[str]]:
    """Writes a store of examples.

    Args:
        files: jsonl files by the name of their source.
        root: Directory to write, not there yet.
        tokenizer: Of the model that is fine-tuned.
        chat_template: Of conversations; None: that of `kinds`.
        validation_share: Share of the examples that are held out.
        held_out: Files of examples that are all held out, by the name of their source.
        labels: Classes that the model tells apart already, by number; they stay so where the examples have no other.

    Returns:
        The store, what it holds, and how many records were left out for which reason.

    Raises:
        UserError: the files hold no examples of one kind, or the tokenizer lacks the marks.
    """
    if RESERVED[-1] not in tokenizer.ids():
        raise UserError("examples need the reserved tokens, and the tokenizer lacks them")
    places = {**files, **(held_out or {})}
    found = {name: read_records(place) for name, place in places.items()}
    records = [record for each in found.values() for record in each if record is not None]
    kind = _kind(records, places)
    facts = Facts(
        kind=kind,
        labels=labels_of(records, kind, labels),
        chat_template=(chat_template or CHAT_TEMPLATE) if any("messages" in record for record in records) else None,
    )
    encoder, refused = Encoder(tokenizer, facts), Counter[str]()
    settings = [list(places), validation_share, facts.chat_template]
    hashes = [hash_file(place) for place in places.values()]
    configuration = hash_bytes(json.dumps(["examples", settings, hashes], ensure_ascii=False).encode())
    writer = StoreWriter(root, tokenizer=tokenizer, configuration=configuration)
    facts.write(root)
    for name, lines in found.items():
        documents = list(_documents(name, lines, encoder, refused))
        chosen = {split: [] for split in (TRAINING, VALIDATION)}
        for document, digest in documents:
            out = name in (held_out or {}) or digest < validation_share
            chosen[VALIDATION if out else TRAINING].append(document)
        for split, part in chosen.items():
            writer.add_shard(name, split, iter(part))
    if not writer.shards:
        raise UserError(f"{', '.join(map(str, places.values()))}: no example could be used: {_told(refused)}")
    return writer.finish(), facts, refused


def _kind(records: Sequence[Mapping[str, Any]], places: Mapping[str, Path]) -> Kind:
    for record in records:
        try:
            return kind_of(record)
        except Refused:
            continue
    raise UserError(
        f"{', '.join(map(str, places.values()))}: no line is an example: expected JSON with messages, with prompt and "
        "completion, with text and label, or with words and labels"
    )


def _documents(
    name: str, lines: Sequence[Mapping[str, Any] | None], encoder: Encoder, refused: Counter[str]
) -> Iterator[tuple[TokenizedDocument, float]]:
    """Each usable record, and a number from 0 to below 1 that follows from it."""
    for number, record in enumerate(lines):
        try:
            if record is None:
                raise Refused(NOT_JSON)
            tokens = encoder(record)
        except Refused as reason:
            refused[str(reason)] += 1
            continue
        content = orjson.dumps(record, option=orjson.OPT_SORT_KEYS)
        document = TokenizedDocument(id=f"{name}:{number}", tokens=tokens, text_bytes=len(content))
        yield document, xxhash.xxh3_64_intdigest(content) / 2.0**64


def _told(refused: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in refused.most_common(3))
