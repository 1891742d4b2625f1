"""Deduplication or decontamination alone: jsonl and parquet in, the kept records out, every field untouched.

    select(inputs, output)  ->  OUTPUT/<the input files' names>   clusters.parquet   hits.parquet   report.json

The stages are those of `data build` (texts are compared in their normal form; lengths do not matter), and what they
decide is applied to the input files in a second pass: a kept line of jsonl is copied byte by byte, a kept row of
parquet with all its columns, in the same order, format and compression. Each input is a source; of two duplicates the
one of the earlier input stays. A job that was killed goes on where it stopped; report.json is written last.
"""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline import sealed
from data_pipeline.config import CleanConfig, DataConfig, SourceConfig, SourceFormat, StagesConfig
from data_pipeline.decontaminate import read_hits
from data_pipeline.dedup.clusters import write_clusters
from data_pipeline.document import Mapper, map_in_order
from data_pipeline.pipeline import Documents, Pipeline
from data_pipeline.places import facts_of, open_file
from data_pipeline.readers import jsonl_records, read_rows, readable
from data_pipeline.reading import Reading
from data_pipeline.report import Tally, kept
from data_pipeline.sources import InputFile, SourceFiles, find_files
from data_pipeline.stages import room_on_disk
from parallel.common.errors import ConfigError, UserError
from parallel.common.files import atomic_writer, sync_directory, write_json

WORK = ".work"
_ROWS = 4096


def select(
    inputs: Sequence[SourceConfig], output: Path, stages: StagesConfig, mapper: Mapper = map_in_order
) -> dict[str, Any]:
    """Runs the stages over the inputs and writes what they keep; returns the report.

    Raises:
        UserError: an input is no jsonl or parquet or cannot be read, the output holds other files, the disk is full.
    """
    unlimited = CleanConfig(min_characters=0, max_characters=sys.maxsize)
    config = DataConfig(sources=list(inputs), store=str(output), stages=replace(stages, clean=unlimited))
    problems = list(config.problems())
    if problems:
        raise ConfigError(problems)
    sources = [find_files(source) for source in inputs]
    for source in sources:
        for file in source.files:
            if file.format not in (SourceFormat.jsonl, SourceFormat.parquet):
                raise UserError(f"{file.path} is neither jsonl nor parquet, which is what can be given back as it was")
    _refuse_foreign(output)
    work = output / WORK
    work.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(config, sources, work, mapper)
    documents = pipeline.documents()
    with room_on_disk(output / "report.json", "output"):
        _write_kept(pipeline, documents, output)
        write_clusters(documents.parts, documents.removals, output / sealed.CLUSTERS)
        if stages.decontaminate.files:
            with atomic_writer(output / "hits.parquet") as file:
                pq.write_table(read_hits(work / "decontaminate").drop_columns(["row"]), file, compression="zstd")
        report = sealed.report_of(pipeline.settings, sources, pipeline.report)
        write_json(output / "report.json", report)
    shutil.rmtree(work)
    return report


def _refuse_foreign(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be made: {error.strerror}") from error
    names = sorted(entry.name for entry in output.iterdir())
    if names and WORK not in names:
        raise UserError(f"--output {output} holds other files ({names[0]}): expected a new or empty directory")


def _write_kept(pipeline: Pipeline, documents: Documents, output: Path) -> None:
    """The second pass: every input file again, only what is kept."""
    total = sum(file.bytes for source in pipeline.sources for file in source.files)
    first = 0
    with pipeline.screen.meter("output", total) as meter:
        for source in pipeline.sources:
            rows = kept(pipeline.report["read"]["counts"], source.config.name)[0]
            wanted = iter(documents.kept[first : first + rows].tolist())
            first += rows
            place = output if len(pipeline.sources) == 1 else output / source.config.name
            for file in source.files:
                _copy(file, source, place / file.name, wanted)
                meter.advance(file.bytes)
            left = next(wanted, None)
            if left is not None:
                raise UserError(f"the data source {source.config.name} changed while it was read: run it again")


def _copy(file: InputFile, source: SourceFiles, target: Path, wanted: Iterator[bool]) -> None:
    reading = Reading(config=source.config, tally=Tally([source.config.name]))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.tmp")
    try:
        with readable(file, source.config.name):
            if file.format is SourceFormat.parquet:
                _copy_parquet(file, reading, partial, wanted)
            else:
                _copy_jsonl(file, reading, partial, wanted)
            facts = facts_of(file.path)
        if (facts.bytes, facts.modified_ns) != (file.bytes, file.modified_ns):
            raise UserError(f"{file.path} changed while it was read: run it again when it is at rest")
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(target.parent)


def _copy_jsonl(file: InputFile, reading: Reading, target: Path, wanted: Iterator[bool]) -> None:
    with _compressed(target, file.compression) as out:
        for line, _, text in jsonl_records(file, reading):
            if text and not text.isspace() and next(wanted):
                out.write(line)
                out.write(b"\n")


@contextmanager
def _compressed(path: Path, compression: str | None) -> Iterator[pa.NativeFile]:
    with pa.OSFile(str(path), "wb") as raw:
        if compression is None:
            yield raw
            return
        with pa.CompressedOutputStream(raw, compression) as out:
            yield out


def _copy_parquet(file: InputFile, reading: Reading, target: Path, wanted: Iterator[bool]) -> None:
    """Row groups and compression as they were; a group of which nothing is kept goes."""
    with pq.ParquetFile(open_file(file.path)) as parquet:
        schema, count = parquet.schema_arrow, parquet.metadata.num_row_groups
        codec = parquet.metadata.row_group(0).column(0).compression.lower() if count else "snappy"
        with pq.ParquetWriter(target, schema, compression=codec if codec != "uncompressed" else "none") as writer:
            for number in range(count):
                table = parquet.read_row_group(number, use_threads=False)
                chosen = _kept_rows(table, reading, wanted)
                if chosen.any():
                    writer.write_table(table.filter(pa.array(chosen)))


def _kept_rows(table: pa.Table, reading: Reading, wanted: Iterator[bool]) -> NDArray[np.bool_]:
    """Which rows of a table stay, [rows]; those without a text go."""
    chosen = np.zeros(table.num_rows, dtype=bool)
    row = 0
    for batch in table.to_batches(max_chunksize=_ROWS):
        has_text = ~np.asarray(batch.column(reading.config.text_field).is_null())
        texts = (text for _, text in read_rows(batch, "", row, reading))
        for place, text in zip(np.flatnonzero(has_text) + row, texts, strict=True):
            chosen[place] = bool(text) and not text.isspace() and next(wanted)
        row += batch.num_rows
    return chosen
