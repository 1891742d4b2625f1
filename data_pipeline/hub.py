"""Hugging Face datasets as sources: a name on the Hub, a directory of data files, or one that `save_to_disk` wrote.

Contract: the rows of one split in their order, streaming and never shuffled, as arrow tables, so that nothing but text
and id is decoded; no code of a dataset is ever run. What `datasets` found for the split stands for it as its files: of
a directory with sizes and times, of the Hub with the revision in their paths, so that a build notices any change.

`datasets` is imported when the first such source is met.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.config import SourceConfig, SourceFormat
from data_pipeline.readers import read_rows, require_text
from data_pipeline.reading import Reading
from data_pipeline.sources import InputFile, SourceFiles
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

datasets = Lazy("datasets")

_ROWS = 256
"""Rows of a table; all columns of so many are in memory."""
_SAVED = ("state.json", "dataset_dict.json")
"""Files that only `save_to_disk` writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Split:
    """An open split."""

    rows: Any
    """A Dataset, or an IterableDataset."""
    paths: tuple[str, ...]
    """Its files, or what else tells its revision."""


def find_dataset(config: SourceConfig) -> SourceFiles:
    """The files that the split is made of, in the order in which they are read.

    Raises:
        UserError: there is no such dataset, subset or split, or the Hub cannot be reached.
    """
    return SourceFiles(config=config, files=_files(_open(config), config), passed_over=0)


def read_dataset(source: SourceFiles, reading: Reading) -> Iterator[tuple[str, str]]:
    """(id, text) of each row.

    Raises:
        UserError: there is no column of text, the data cannot be read to its end, or changed since it was found.
    """
    config = source.config
    split = _open(config)
    _refuse_change(source, split)
    place = f"{config.name}/{config.split}"
    row = 0
    for table in _tables(split, config):
        require_text(table.schema, f"the split {config.split} of {config.paths[0]}", reading)
        for batch in table.to_batches():
            yield from read_rows(batch, place, row, reading)
            row += batch.num_rows
    _refuse_change(source, split)


def _failures() -> tuple[type[Exception], ...]:
    """What `datasets` raises about data, names and the network."""
    return (
        datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, ImportError, pa.ArrowException,
    )  # fmt: skip


def _open(config: SourceConfig) -> _Split:
    datasets.disable_progress_bars()
    path = os.path.expanduser(config.paths[0])
    if os.path.isfile(path):
        raise UserError(
            f"data source {config.name}: {path} is a file, but format=datasets reads a directory or a name on the Hub"
        )
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in _SAVED):
            return _open_saved(path, config)
        return _open_streaming(path, config)
    except _failures() as error:
        raise UserError(f"data source {config.name}: {_why(path, config, error)}") from error


def _open_saved(path: str, config: SourceConfig) -> _Split:
    """What `save_to_disk` wrote; it stays on disk and is mapped into memory."""
    if config.subset is not None:
        raise UserError(f"data source {config.name}: {path} was written by save_to_disk: leave subset out")
    found = datasets.load_from_disk(path, keep_in_memory=False)
    if isinstance(found, datasets.Dataset):
        found = {str(found.split or config.split): found}
    rows = found[_known_split([str(name) for name in found], config)]
    return _Split(rows=rows, paths=tuple(file["filename"] for file in rows.cache_files))


def _open_streaming(path: str, config: SourceConfig) -> _Split:
    builder = datasets.load_dataset_builder(path, name=config.subset)
    found = builder.as_streaming_dataset()
    assert isinstance(found, dict)
    split = _known_split([str(name) for name in found], config)
    paths = (builder.config.data_files or {}).get(split)
    # A dataset that only the cache has, when the Hub is out of reach, is known by its hash instead.
    return _Split(rows=found[split], paths=tuple(paths or [f"{path}@{builder.hash}"]))


def _known_split(splits: list[str], config: SourceConfig) -> str:
    if config.split in splits:
        return config.split
    raise UserError(
        f"data source {config.name}: {config.paths[0]} has no split {config.split!r}: set split to one of "
        f"{', '.join(splits)}"
    )


def _why(path: str, config: SourceConfig, error: Exception) -> str:
    """What is wrong with a dataset that cannot be opened, and what would be right."""
    said = _said(error)
    if isinstance(error, ConnectionError):
        return f"{path} is no directory here, and the Hub cannot be reached ({said}): give a directory, or go online"
    if isinstance(error, FileNotFoundError) and not os.path.isdir(path):
        return f"there is no dataset {path}: expected a directory (from {Path.cwd()}) or a name on the Hub"
    if isinstance(error, FileNotFoundError):
        return f"{path} holds no data files that `datasets` knows"
    if isinstance(error, ValueError):
        try:
            subsets = datasets.get_dataset_config_names(path)
        except _failures():
            subsets = []
        if subsets and (config.subset or "default") not in subsets:
            what = "several subsets" if config.subset is None else f"no subset {config.subset!r}"
            return f"{path} has {what}: set subset to one of {', '.join(subsets)}"
    return f"{path} cannot be opened: {said}"


def _said(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _files(split: _Split, config: SourceConfig) -> tuple[InputFile, ...]:
    root = os.path.abspath(os.path.expanduser(config.paths[0]))
    files = []
    for path in split.paths:
        facts = os.stat(path) if os.path.isfile(path) else None
        files.append(
            InputFile(
                path=path,
                name=path if facts is None else os.path.relpath(path, root),
                format=SourceFormat.datasets,
                compression=None,
                bytes=0 if facts is None else facts.st_size,
                modified_ns=0 if facts is None else facts.st_mtime_ns,
            )
        )
    return tuple(files)


def _refuse_change(source: SourceFiles, split: _Split) -> None:
    if _files(split, source.config) != source.files:
        raise UserError(
            f"data source {source.config.name}: {source.config.path} changed while it was read: run "
            f"`bloomery data build` again when it is at rest"
        )


def _tables(split: _Split, config: SourceConfig) -> Iterator[pa.Table]:
    """The rows in tables; what stops them is told with the source's name."""
    tables = iter(split.rows.with_format("arrow").iter(batch_size=_ROWS))
    while True:
        try:
            table = next(tables, None)
        except _failures() as error:
            raise UserError(
                f"data source {config.name}: the split {config.split} of {config.paths[0]} cannot be read to its end: "
                f"{_said(error)}"
            ) from error
        if table is None:
            return
        yield table
