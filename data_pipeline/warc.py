"""Web archives: the text of WET files, and of the pages in WARC files (extra `warc`).

A `conversion` record holds text already (Common Crawl's WET files). Of a `response` that is HTML and succeeded,
trafilatura takes the main text, without menus and boilerplate. Other records (requests, metadata, images, redirects)
are passed over; a page without text is counted. A document is named by its record's id.
"""

import logging
from collections.abc import Iterator
from typing import Any

from data_pipeline.places import open_stream
from data_pipeline.reading import Reading
from data_pipeline.sources import InputFile
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

# Without them web archives are refused; nothing else needs these.
trafilatura = Lazy("trafilatura")
archives = Lazy("warcio.archiveiterator")
failures = Lazy("warcio.exceptions")

# It would say of every empty page that it is one; they are counted.
logging.getLogger("trafilatura").setLevel(logging.CRITICAL)

NO_PAGE_TEXT = "page without text"
_HTML = ("text/html", "application/xhtml+xml")


def read_warc(file: InputFile, reading: Reading) -> Iterator[tuple[str, str]]:
    """(id, text) of each record with a text.

    Raises:
        UserError: the extra is not installed, or the file is no web archive.
        OSError: it is cut off.
    """
    if not trafilatura.is_installed:
        raise UserError(f"{file.path} is a web archive: install what reads it with `pip install bloomery[warc]`")
    with open_stream(file.path, file.compression) as stream:
        number = 0
        try:
            for number, record in enumerate(archives.ArchiveIterator(stream), start=1):
                found = _text(record, reading)
                if found is not None:
                    name = (
                        record.rec_headers.get_header("WARC-Record-ID") or f"{reading.config.name}/{file.name}:{number}"
                    )
                    yield name.strip("<>"), found
        except failures.ArchiveLoadFailed as error:
            raise UserError(f"{file.path} is no web archive from its record {number + 1} on: {error}") from error


def _text(record: Any, reading: Reading) -> str | None:
    """The text of a record; None where it is none of ours, or has none."""
    if record.rec_type == "conversion":
        return reading.decode(_content(record))
    if record.rec_type != "response" or record.http_headers is None:
        return None
    kind = (record.http_headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    if kind not in _HTML or record.http_headers.get_statuscode() != "200":
        return None
    html = _content(record)
    text = trafilatura.extract(html, include_comments=False)
    if not text:
        reading.drop(NO_PAGE_TEXT, record.rec_headers.get_header("WARC-Target-URI") or "", html)
        return None
    return text


def _content(record: Any) -> bytes:
    """The whole content of a record, which says how long it is."""
    content = record.content_stream().read()
    if getattr(record.raw_stream, "limit", 0):
        raise OSError(f"Truncated: the record {record.rec_headers.get_header('WARC-Record-ID')} is cut off")
    return content
