"""Which files a source is made of.

Contract: the list is the same for the same files, in any directory listing's order: by path, and of a tree with a
limit by a hash of the path, so that the part which is read is spread over all of it and not taken from the front of
the alphabet. Links are not followed, so nothing outside a tree is read and nothing twice. Of each file its size and
time are kept: a second build reads again only where one of them changed.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import xxhash

from data_pipeline.config import SourceConfig, SourceFormat
from data_pipeline.places import Facts, facts_of, is_url, listing
from parallel.common.errors import UserError

_ENDINGS = {
    ".jsonl": SourceFormat.jsonl,
    ".ndjson": SourceFormat.jsonl,
    ".parquet": SourceFormat.parquet,
    ".txt": SourceFormat.txt,
    ".warc": SourceFormat.warc,
    ".wet": SourceFormat.warc,
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_PASSED_OVER = frozenset({".git", ".hg", ".svn", "__pycache__"})
_TABLES = frozenset({"clusters.parquet", "hits.parquet"})
"""What `data dedup` and `data decontaminate` write beside the documents, which may be read again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """A file to read."""

    path: str
    name: str
    """Path relative to the source's directory (several directories: after their names); documents are named by it."""
    format: SourceFormat
    compression: str | None
    """`gzip`, `zstd` or None."""
    bytes: int
    """Size on disk."""
    modified_ns: int
    """Time of the last change, nanoseconds since 1970."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFiles:
    """A source and its files, in the order in which they are read."""

    config: SourceConfig
    files: tuple[InputFile, ...]
    passed_over: int
    """Files of a directory whose names do not tell a known format."""

    @property
    def is_tree(self) -> bool:
        """Every document is a file of a source tree."""
        return self.config.format is SourceFormat.tree


def find_files(config: SourceConfig) -> SourceFiles:
    """Lists a source's files.

    Raises:
        UserError: a path does not exist, a glob matches nothing, or no file has a known format.
    """
    files: list[InputFile] = []
    passed_over = 0
    for root, prefix in _roots(config):
        for path, relative, facts in _entries(root, config):
            known = _format(relative, config.format)
            if known is None and path == root:
                raise UserError(
                    f"data source {config.name}: the format of {root} is not clear from its name: expected "
                    f"{', '.join(_ENDINGS)}, also with .gz or .zst (not parquet), or data.sources format=txt or jsonl"
                )
            if known is None:
                passed_over += 1
                continue
            facts = facts_of(path) if facts is None else facts
            files.append(
                InputFile(
                    path=path,
                    name=os.fsencode(prefix + relative).decode(errors="replace"),
                    format=known[0],
                    compression=known[1],
                    bytes=facts.bytes,
                    modified_ns=facts.modified_ns,
                )
            )
    if not files:
        wanted = " that match include and exclude" if config.include or config.exclude else ""
        hint = f" ({passed_over:,} of other names; format=tree reads every text file)" if passed_over else ""
        raise UserError(f"data source {config.name}: {_shown(config)} holds no files to read{wanted}{hint}")
    spread = config.format is SourceFormat.tree and config.limit_bytes is not None
    files.sort(key=_spread if spread else _by_name)
    return SourceFiles(config=config, files=tuple(files), passed_over=passed_over)


def fingerprint_of_files(sources: Iterable[SourceFiles]) -> str:
    """xxh3-128 of all names and sizes."""
    digest = xxhash.xxh3_128()
    for source in sources:
        digest.update(repr((source.config.name, [(file.name, file.bytes) for file in source.files])).encode())
    return digest.hexdigest()


def _shown(config: SourceConfig) -> str:
    return ", ".join(config.paths)


def _by_name(file: InputFile) -> bytes:
    return os.fsencode(file.name)


def _spread(file: InputFile) -> tuple[int, bytes]:
    name = os.fsencode(file.name)
    return xxhash.xxh3_64_intdigest(name), name


def _roots(config: SourceConfig) -> list[tuple[str, str]]:
    """Files and directories that the paths and globs name, each with the prefix of its documents' names."""
    roots: list[str] = []
    for given in config.paths:
        if is_url(given):
            roots.append(given.rstrip("/"))
            continue
        path = os.path.expanduser(given)
        found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            what = "no file matches" if glob.has_magic(path) else "there is no file or directory"
            raise UserError(f"data source {config.name}: {what} {given} (from {Path.cwd()})")
        roots += [root.rstrip("/") or "/" for root in found if root not in roots]
    if config.format is SourceFormat.tree and (file := next((root for root in roots if os.path.isfile(root)), None)):
        raise UserError(f"data source {config.name}: {file} is a file, but format=tree reads directories")
    if len(roots) == 1:
        return [(roots[0], "")]
    names = [os.path.basename(os.path.realpath(root)) for root in roots]
    if len(set(names)) < len(names):
        common = os.path.commonpath([os.path.abspath(root) for root in roots])
        names = [os.path.relpath(root, common) for root in roots]
    return [
        (root, f"{name}/" if is_url(root) or os.path.isdir(root) else f"{os.path.dirname(name)}/".lstrip("/"))
        for root, name in zip(roots, names, strict=True)
    ]


def _entries(root: str, config: SourceConfig) -> Iterator[tuple[str, str, Facts | None]]:
    """(path, relative path, facts where they are known) of the files that a root names."""
    if is_url(root):
        yield from _listed(root, config)
    elif os.path.isdir(root):
        yield from ((path, relative, None) for path, relative in _walk(root, config))
    else:
        yield root, os.path.basename(root), None


def _listed(url: str, config: SourceConfig) -> Iterator[tuple[str, str, Facts | None]]:
    include, exclude = _matcher(config.include), _matcher(config.exclude)
    try:
        for path, relative, facts in listing(url):
            if path == url or (not exclude(relative) and (not config.include or include(relative))):
                yield path, relative, facts
    except FileNotFoundError as error:
        raise UserError(f"data source {config.name}: there is no file or directory {url}") from error
    except (OSError, ValueError, ImportError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"data source {config.name}: {url} cannot be listed: {said}") from error


def _walk(root: str, config: SourceConfig) -> Iterator[tuple[str, str]]:
    """(path, path relative to the root) of the regular files below a directory that include and exclude let through."""
    include, exclude = _matcher(config.include), _matcher(config.exclude)
    directories = [""]
    while directories:
        directory = directories.pop()
        try:
            entries = list(os.scandir(os.path.join(root, directory)))
        except OSError as error:
            raise UserError(
                f"data source {config.name}: {error.filename} cannot be listed: {error.strerror}"
            ) from error
        for entry in entries:
            relative = f"{directory}/{entry.name}" if directory else entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _PASSED_OVER and not exclude(f"{relative}/"):
                    directories.append(relative)
            elif (
                entry.is_file(follow_symlinks=False)
                and entry.name not in _TABLES
                and not exclude(relative)
                and (not config.include or include(relative))
            ):
                yield entry.path, relative


def _format(name: str, wanted: SourceFormat) -> tuple[SourceFormat, str | None] | None:
    """Format and compression of a file, or None where its name does not tell."""
    if wanted is SourceFormat.tree:
        return SourceFormat.tree, None
    stem, ending = os.path.splitext(name.lower())
    compression = _COMPRESSIONS.get(ending)
    if compression is not None:
        ending = os.path.splitext(stem)[1]
    found = _ENDINGS.get(ending) if wanted is SourceFormat.auto else wanted
    if found is None or (found is SourceFormat.parquet and compression is not None):
        return None
    return found, compression


class _Matcher:
    """Whether a relative path matches one of some globs; a directory is asked for with a slash at its end."""

    def __init__(self, globs: Sequence[str]) -> None:
        self._patterns = [re.compile(_regular_expression(pattern)) for pattern in globs]

    def __call__(self, relative: str) -> bool:
        return any(pattern.fullmatch(relative) for pattern in self._patterns)


@cache
def _matcher(globs: tuple[str, ...]) -> _Matcher:
    return _Matcher(globs)


_GLOB_PART = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^]]+\]|.", re.DOTALL)


def _regular_expression(pattern: str) -> str:
    """`*` and `?` stay inside a directory, `**` goes through any; a pattern without a slash is for the name alone."""
    if "/" not in pattern:
        pattern = f"**/{pattern}"
    translated = []
    for part in _GLOB_PART.findall(pattern):
        if part == "**/":
            translated.append("(?:.*/)?")
        elif part == "**":
            translated.append(".*")
        elif part == "*":
            translated.append("[^/]*")
        elif part == "?":
            translated.append("[^/]")
        elif len(part) > 1:
            translated.append(part.replace("[!", "[^"))
        else:
            translated.append(re.escape(part))
    return "(?s:" + "".join(translated) + ")"
