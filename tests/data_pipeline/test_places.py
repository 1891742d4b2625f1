"""Sources that are no local text files: web archives, a store that speaks S3, what fsspec opens."""

import gzip
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parallel.common.errors import UserError
from tests.data_pipeline.test_sources import lines, read

warcio = pytest.importorskip("warcio.warcwriter", reason="the extra `warc` is not installed")
headers = pytest.importorskip("warcio.statusandheaders")

PARAGRAPH = "The furnace stands at the edge of the village, and the men who work there begin before the sun is up. "


def page(body: str, script: str = "") -> bytes:
    head = f"<head><title>t</title><script>{script}</script></head>"
    article = f"<article><p>{body}</p><p>{PARAGRAPH * 3}</p></article>"
    return f"<html>{head}<body><nav>Home About</nav>{article}</body></html>".encode()


def archive(records: list[tuple[str, str, str, bytes]]) -> bytes:
    """A WARC file of (kind, content type, status, content)."""
    out = io.BytesIO()
    writer = warcio.WARCWriter(out, gzip=True)
    for number, (kind, content_type, status, content) in enumerate(records):
        http = None
        if kind == "response":
            http = headers.StatusAndHeaders(status, [("Content-Type", content_type)], protocol="HTTP/1.1")
        given = {"WARC-Record-ID": f"<urn:uuid:{number}>", "WARC-Date": "2026-01-01T00:00:00Z"}
        record = writer.create_warc_record(
            f"http://example.org/{number}",
            kind,
            payload=io.BytesIO(content),
            http_headers=http,
            warc_headers_dict=given,
            warc_content_type="text/plain" if http is None else "",
        )
        writer.write_record(record)
    return out.getvalue()


# warcio's writer leaves its temporary files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_web_archives_give_the_text_of_their_pages(tmp_path: Path) -> None:
    records = [
        ("conversion", "", "", "Ein Text, größer als andere.".encode()),
        ("response", "text/html; charset=utf-8", "200 OK", page("A page about iron.", "var x = 1;")),
        ("response", "image/png", "200 OK", b"\x89PNG"),
        ("response", "text/html", "404 Not Found", page("Not there.")),
        ("response", "text/html", "200 OK", b"<html><body></body></html>"),
        ("request", "", "", b"GET / HTTP/1.1\r\n\r\n"),
    ]
    content = archive(records)
    (tmp_path / "a.warc.gz").write_bytes(content)
    found, dropped, _ = read(tmp_path / "a.warc.gz")
    assert [identifier for identifier, _ in found] == ["urn:uuid:0", "urn:uuid:1"]
    assert found[0][1] == "Ein Text, größer als andere."
    assert "A page about iron." in found[1][1]
    assert "var x" not in found[1][1]
    assert "Home About" not in found[1][1]
    assert dropped == {"page without text": 1}
    (tmp_path / "b.warc").write_bytes(gzip.decompress(content))
    assert read(tmp_path / "b.warc")[0] == found
    (tmp_path / "cut.warc.gz").write_bytes(content[:-40])
    with pytest.raises(UserError, match=r"cut\.warc\.gz cannot be read: it is cut off"):
        read(tmp_path / "cut.warc.gz")
    (tmp_path / "cut.warc").write_bytes(gzip.decompress(archive(records[:1]))[:-12])
    with pytest.raises(UserError, match=r"cut\.warc cannot be read: it is cut off"):
        read(tmp_path / "cut.warc")
    (tmp_path / "no.warc").write_bytes(b"this is no archive\n")
    with pytest.raises(UserError, match="is no web archive"):
        read(tmp_path / "no.warc")


class S3(BaseHTTPRequestHandler):
    """As much of S3 as reading needs: HEAD, GET with ranges, ListObjectsV2. Objects are the server's `objects`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        url = urlsplit(self.path)
        key, query = unquote(url.path).lstrip("/"), parse_qs(url.query)
        objects: dict[str, bytes] = self.server.objects  # type: ignore[attr-defined]
        if "list-type" in query:
            prefix = f"{key.rstrip('/')}/{query.get('prefix', [''])[0]}"
            entries = "".join(
                f"<Contents><Key>{name.partition('/')[2]}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>x</ETag><Size>{len(content)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                for name, content in sorted(objects.items())
                if name.startswith(prefix)
            )
            return self.reply(
                200,
                f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode(),
                with_body,
            )
        if key not in objects:
            return self.reply(404, b"", with_body)
        content, given = objects[key], self.headers.get("Range")
        if given:
            first, _, last = given.removeprefix("bytes=").partition("-")
            part = content[int(first) : int(last) + 1]
            return self.reply(206, part, with_body, {"Content-Range": f"bytes {first}-{last}/{len(content)}"})
        return self.reply(200, content, with_body)

    def reply(self, status: int, body: bytes, with_body: bool, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The objects of a server on this machine, `bucket/name` to content."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), S3)
    server.objects = {}  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield server.objects  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_objects_of_s3_are_read_in_place(bucket: dict[str, bytes], tmp_path: Path) -> None:
    records = [{"id": str(number), "text": f"text number {number}"} for number in range(50)]
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"id": "p", "text": "from parquet"}]), table)
    bucket |= {
        "corpora/web/a.jsonl.gz": gzip.compress(lines(*records[:30])),
        "corpora/web/deep/b.jsonl": lines(*records[30:]),
        "corpora/web/c.parquet": table.getvalue(),
        "corpora/web/readme.md": b"not read",
        "corpora/other/x.jsonl": lines({"text": "elsewhere"}),
    }
    found, _, _ = read("s3://corpora/web")
    assert sorted(found) == sorted([*((record["id"], record["text"]) for record in records), ("p", "from parquet")])
    assert read("s3://corpora/web/a.jsonl.gz")[0] == [(record["id"], record["text"]) for record in records[:30]]
    assert len(read("s3://corpora/web", include=("*.parquet",))[0]) == 1
    with pytest.raises(UserError, match="there is no file or directory s3://corpora/none"):
        read("s3://corpora/none")
    bucket["corpora/web/a.jsonl.gz"] = bucket["corpora/web/a.jsonl.gz"][:-20]
    with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read: it is cut off"):
        read("s3://corpora/web/a.jsonl.gz")


def test_what_fsspec_opens_is_a_source(tmp_path: Path) -> None:
    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write(json.dumps({"id": "1", "text": "in memory"}).encode() + b"\n")  # type: ignore[union-attr]
    assert read("memory://corpus")[0] == [("1", "in memory")]
    with pytest.raises(UserError, match="cannot be listed"):
        read("gopher://example.org/a.jsonl")
