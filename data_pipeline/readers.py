"""Files to documents: jsonl, parquet, txt, web archives and source trees, plain or compressed.

Contract: nothing is lost silently. A document that cannot be had is told to the tally with its reason; bytes that are
no UTF-8 become U+FFFD and are counted; a file that ends before its compression does, that is no parquet, or that
changes while it is read stops the build with its name. Lines and files are taken one at a time: memory holds one
document and a few MiB.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.config import SourceFormat
from data_pipeline.places import facts_of, open_file, open_stream
from data_pipeline.reading import Reading
from data_pipeline.sources import InputFile
from data_pipeline.warc import read_warc
from parallel.common.errors import UserError
from parallel.common.units import format_bytes

_CHUNK_BYTES = 4 << 20
_LARGEST_TREE_FILE_BYTES = 256 << 20
_SNIFFED_BYTES = 65_536
_ROWS = 4096
_WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")

NOT_JSON = "not valid JSON"
NO_TEXT = "no text field"
NOT_TEXT = "text field is not a string"
EMPTY = "empty"
BINARY = "binary file"
TOO_LARGE = f"file over {format_bytes(_LARGEST_TREE_FILE_BYTES)}"


def read_file(file: InputFile, reading: Reading) -> Iterator[tuple[str, str]]:
    """(id, text) of each document of a file.

    Raises:
        UserError: the file cannot be read to its end, or changed meanwhile.
    """
    reader = _READERS[file.format]
    with readable(file, reading.config.name):
        yield from reader(file, reading)
        facts = facts_of(file.path)
    if (facts.bytes, facts.modified_ns) != (file.bytes, file.modified_ns):
        raise UserError(f"{file.path} changed while it was read: run `bloomery data build` again when it is at rest")


@contextmanager
def readable(file: InputFile, source: str) -> Iterator[None]:
    """Turns what libraries say about damaged files into a sentence with the file's name."""
    try:
        if file.compression is not None and file.bytes == 0:
            raise UserError(f"data source {source}: {file.path} is cut off: it has no bytes at all")
        yield
    except (OSError, pa.ArrowInvalid) as error:
        said = str(error).strip().rstrip(".") or type(error).__name__
        if isinstance(error, FileNotFoundError):
            hint = "it was removed while the corpus was read"
        elif "Truncated" in said:
            hint = "it is cut off (a download that broke?); fetch it again or leave it out"
        else:
            hint = f"{said}; repair it or leave it out"
        raise UserError(f"data source {source}: {file.path} cannot be read: {hint}") from error


def _chunks(file: InputFile) -> Iterator[bytes]:
    with open_stream(file.path, file.compression) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _lines(file: InputFile) -> Iterator[bytes]:
    """Lines without their ends; a line of any length is put together once."""
    begun: list[bytes] = []
    for chunk in _chunks(file):
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        if rest:
            yield b"".join(begun)
            yield from rest[:-1]
            begun = [rest[-1]]
    if last := b"".join(begun):
        yield last


def _read_jsonl(file: InputFile, reading: Reading) -> Iterator[tuple[str, str]]:
    for _, identifier, text in jsonl_records(file, reading):
        yield identifier, text


def jsonl_records(file: InputFile, reading: Reading) -> Iterator[tuple[bytes, str, str]]:
    """(line without its end, id, text) of each record that has a text."""
    text_field, id_field = reading.config.text_field, reading.config.id_field
    for number, line in enumerate(_lines(file), start=1):
        if number == 1:
            _refuse_wide(line, file, reading)
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line or line.isspace():
            continue
        position = f"{reading.config.name}/{file.name}:{number}"
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError:
            record = _lenient_json(line, reading)
        if not isinstance(record, dict):
            reading.drop(NOT_JSON, position, line)
            continue
        text = record.get(text_field)
        if isinstance(text, str):
            identifier = record.get(id_field)
            named = isinstance(identifier, int | str) and identifier != ""
            name = reading.without_surrogates(str(identifier)) if named else position
            yield line, name, reading.without_surrogates(text)
        elif text is None:
            reading.fields_seen.update(record)
            reading.drop(NO_TEXT, position, line)
        else:
            reading.drop(NOT_TEXT, position, line)


def _lenient_json(line: bytes, reading: Reading) -> Any:
    """What orjson refuses and Python reads: broken UTF-8, half characters, NaN. None where it is no JSON at all."""
    try:
        return json.loads(reading.decode(line))
    except (ValueError, RecursionError):
        return None


def _refuse_wide(start: bytes, file: InputFile, reading: Reading) -> None:
    if start.startswith(_WIDE_MARKS):
        raise UserError(f"data source {reading.config.name}: {file.path} is UTF-16: convert it to UTF-8")


def _read_parquet(file: InputFile, reading: Reading) -> Iterator[tuple[str, str]]:
    text_field, id_field = reading.config.text_field, reading.config.id_field
    with pq.ParquetFile(open_file(file.path)) as parquet:
        schema = parquet.schema_arrow
        require_text(schema, file.path, reading)
        columns = [text_field, *({id_field} & set(schema.names) - {text_field})]
        row = 0
        for batch in parquet.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False):
            yield from read_rows(batch, f"{reading.config.name}/{file.name}", row, reading)
            row += batch.num_rows


def require_text(schema: pa.Schema, where: str, reading: Reading) -> None:
    """Refuses a table without a column of text.

    Raises:
        UserError: the column is missing, with those that are there, or holds something else.
    """
    name, text_field = reading.config.name, reading.config.text_field
    if text_field not in schema.names:
        raise UserError(
            f"data source {name}: {where} has no column {text_field!r}: set text_field to one of "
            f"{', '.join(schema.names)}"
        )
    kind = schema.field(text_field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_kind(kind) for is_kind in _TEXT_KINDS):
        raise UserError(f"data source {name}: the column {text_field!r} of {where} is {kind}: expected text")


def read_rows(batch: pa.RecordBatch, place: str, row: int, reading: Reading) -> Iterator[tuple[str, str]]:
    """(id, text) of each row that has a text; a row without an id is named by its place, `row` being the first."""
    text_field, id_field = reading.config.text_field, reading.config.id_field
    texts = _binary(batch.column(text_field)).to_pylist()
    has_ids = id_field != text_field and id_field in batch.schema.names
    ids = batch.column(id_field).to_pylist() if has_ids else [None] * len(texts)
    for number, (raw, identifier) in enumerate(zip(texts, ids, strict=True), start=row):
        position = f"{place}:{number}"
        if raw is None:
            reading.drop(NO_TEXT, position)
            continue
        named = isinstance(identifier, int | str) and identifier != ""
        yield str(identifier) if named else position, reading.decode(raw)


_TEXT_KINDS: tuple[Callable[[Any], bool], ...] = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
)


def _binary(column: pa.Array) -> pa.Array:
    """Text columns as bytes: a parquet file may hold strings that are not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.large_binary())


def _read_txt(file: InputFile, reading: Reading) -> Iterator[tuple[str, str]]:
    most = reading.config.document_bytes
    name = f"{reading.config.name}/{file.name}"
    held = bytearray()
    pieces = 0
    for chunk in _chunks(file):
        if not held and not pieces:
            _refuse_wide(chunk, file, reading)
        held += chunk
        start = 0
        while most and len(held) - start > most:
            end = start + _cut(held[start : start + most])
            pieces += 1
            yield f"{name}:{pieces}", reading.decode(bytes(held[start:end]))
            start = end
        del held[:start]
    if held or not pieces:
        yield f"{name}:{pieces + 1}" if pieces else name, reading.decode(bytes(held))


def _cut(text: bytearray) -> int:
    """Where a text is cut: after the last empty line of its second half, else a line, else a character."""
    half = len(text) // 2
    for border in (b"\n\n", b"\n\r\n", b"\n"):
        found = text.rfind(border, half)
        if found >= 0:
            return found + len(border)
    end = len(text)
    while end > half and text[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if end > half and text[end - 1] >= 0xC0 else len(text)


def _read_tree(file: InputFile, reading: Reading) -> Iterator[tuple[str, str]]:
    name = f"{reading.config.name}/{file.name}"
    if file.bytes > _LARGEST_TREE_FILE_BYTES:
        reading.drop(TOO_LARGE, name)
        return
    with open_stream(file.path, None) as opened:
        raw = opened.read(_SNIFFED_BYTES)
        if b"\0" not in raw:
            raw += opened.read()
    if b"\0" in raw:
        reading.drop(BINARY, name)
        return
    yield name, reading.decode(raw)


_READERS: dict[SourceFormat, Callable[[InputFile, Reading], Iterator[tuple[str, str]]]] = {
    SourceFormat.jsonl: _read_jsonl,
    SourceFormat.parquet: _read_parquet,
    SourceFormat.txt: _read_txt,
    SourceFormat.tree: _read_tree,
    SourceFormat.warc: read_warc,
}
