"""Files wherever they lie: local paths, and URLs read in place (`s3://`, `gs://`, `hf://`, what else fsspec knows).

S3 and Google Cloud Storage go through Arrow's own clients: keys and region come from the environment as for the
vendors' tools (`AWS_ACCESS_KEY_ID`, `AWS_REGION`, `AWS_ENDPOINT_URL` for a store of one's own). `hf://` is a repository
on the Hugging Face Hub. Every request has a limit.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from parallel.common.lazy import Lazy

fsspec = Lazy("fsspec.core")
huggingface_hub = Lazy("huggingface_hub")

_CHUNK_BYTES = 4 << 20
_CONNECT_SECONDS, _REQUEST_SECONDS = 20, 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What tells whether a file changed."""

    bytes: int
    modified_ns: int
    """0 where the place does not say."""


def is_url(path: str) -> bool:
    """Not a local path."""
    return "://" in path


def facts_of(path: str) -> Facts:
    """Size and time of a file.

    Raises:
        OSError: it is not there, or the place cannot be reached.
    """
    if not is_url(path):
        found = os.stat(path)
        return Facts(bytes=found.st_size, modified_ns=found.st_mtime_ns)
    system, name = _resolve(path)
    return _facts(system.get_file_info(name))


def open_stream(path: str, compression: str | None) -> Any:
    """A binary file to be read from front to back, decompressed."""
    if not is_url(path) and compression is None:
        return open(path, "rb")  # Arrow opens only names that are UTF-8.
    if not is_url(path):
        return pa.input_stream(path, compression=compression, buffer_size=_CHUNK_BYTES)
    system, name = _resolve(path)
    return system.open_input_stream(name, compression=compression, buffer_size=_CHUNK_BYTES)


def open_file(path: str) -> Any:
    """What Arrow's readers of parquet take."""
    if not is_url(path):
        return path
    system, name = _resolve(path)
    return system.open_input_file(name)


def listing(url: str) -> Iterator[tuple[str, str, Facts]]:
    """(URL, path relative to it, facts) of each file below a URL, or of the one that it names.

    Raises:
        FileNotFoundError: there is neither.
        OSError: the place cannot be reached.
    """
    system, name = _resolve(url.rstrip("/"))
    head = url[: url.index("://") + 3]
    info = system.get_file_info(name)
    if info.type == fs.FileType.File:
        yield url, PurePosixPath(name).name, _facts(info)
        return
    found = False
    for entry in system.get_file_info(fs.FileSelector(name, recursive=True, allow_not_found=True)):
        if entry.type == fs.FileType.File:
            found = True
            yield head + entry.path, entry.path.removeprefix(name).lstrip("/"), _facts(entry)
    if not found:
        raise FileNotFoundError(2, "there is no such file or directory", url)


def _facts(info: fs.FileInfo) -> Facts:
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(2, "it is gone", info.path)
    return Facts(bytes=info.size, modified_ns=info.mtime_ns or 0)


def _resolve(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL, and the name of the file in it."""
    scheme, bucket = urlsplit(url).scheme, urlsplit(url).netloc
    name = url[len(scheme) + 3 :]
    if scheme == "s3":
        return _s3(bucket, os.environ.get("AWS_ENDPOINT_URL"), os.environ.get("AWS_REGION")), name
    if scheme == "hf":
        return fs.PyFileSystem(fs.FSSpecHandler(huggingface_hub.HfFileSystem())), name
    if scheme in ("gs", "gcs"):
        return fs.FileSystem.from_uri(f"gs://{name}")
    system, name = fsspec.url_to_fs(url)
    return fs.PyFileSystem(fs.FSSpecHandler(system)), name


@cache
def _s3(bucket: str, endpoint: str | None, region: str | None) -> fs.S3FileSystem:
    if region is None:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region,
        endpoint_override=endpoint,
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        # Only what cannot be read without keys needs them.
        anonymous="AWS_ACCESS_KEY_ID" not in os.environ and "AWS_PROFILE" not in os.environ,
    )
