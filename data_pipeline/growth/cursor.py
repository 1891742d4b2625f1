"""Where a growing store is in its sources, and the documents that come next.

A place is the files that were read to their end, and how many documents of the next one were taken. It is saved with
every portion, so a job that was killed opens the file again, passes over what it had, and goes on with the document
after it: none is lost, none comes twice. Files that come into a directory later are read when all others are.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from data_pipeline.config import SourceConfig, SourceFormat
from data_pipeline.read import documents, find_source
from data_pipeline.reading import Reading
from data_pipeline.report import Tally
from data_pipeline.sources import InputFile, SourceFiles
from parallel.common.errors import UserError


@dataclass(slots=True)
class Place:
    """How far one source was read in a portion; the places of all portions together say where it is."""

    finished: list[str] = field(default_factory=list)
    """Files that were read to their end in this portion."""
    file: str | None = None
    """The file in the middle of which the portion ended."""
    taken: int = 0
    """Documents taken of it, in this portion and those before."""
    file_bytes: int = 0
    """Its size then: a file that is another when the job goes on is refused."""
    read_bytes: int = 0
    """Text read in this portion."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Cursor:
    """The documents of one source, from a place on."""

    def __init__(self, config: SourceConfig, places: Sequence[Place], tally: Tally) -> None:
        """`places` are those of the portions that were committed, in their order."""
        self.config = config
        self._finished = {name for place in places for name in place.finished}
        last = places[-1] if places else Place()
        self._file, self._taken, self._file_bytes = last.file, last.taken, last.file_bytes
        self._left = sys.maxsize if config.limit_bytes is None else config.limit_bytes
        self._left -= sum(place.read_bytes for place in places)
        self._reading = Reading(config=config, tally=tally)
        self._documents = self._run()
        self.place = Place(file=self._file, taken=self._taken, file_bytes=self._file_bytes)

    def count_into(self, tally: Tally) -> None:
        """From now on a new portion counts what is read."""
        self._reading.tally = tally
        self.place = Place(file=self._file, taken=self._taken, file_bytes=self._file_bytes)

    def next(self) -> tuple[str, str, bytes] | None:
        """Id, text and its UTF-8 of the next document; None where there is none at present.

        Raises:
            UserError: a file cannot be read to its end, changed, or is gone before it was finished.
        """
        return next(self._documents, None)

    def look_again(self) -> bool:
        """Whether files have come that were not there before; from then on they are read."""
        found = self._left > 0 and any(file.name not in self._finished for file in self._files())
        if found:
            self._documents = self._run()
        return found

    def _files(self) -> list[InputFile]:
        try:
            files = find_source(self.config).files
        except UserError:
            # A directory that is still empty is no mistake where others have been read from it, or will be.
            if not self._finished:
                raise
            return []
        if self.config.format is SourceFormat.datasets:
            # A split is one file to us: it is read in one piece.
            return [replace(files[0], name=self.config.split)]
        return list(files)

    def _run(self) -> Iterator[tuple[str, str, bytes]]:
        files = [file for file in self._files() if file.name not in self._finished]
        if self._file is not None:
            if all(file.name != self._file for file in files):
                raise UserError(
                    f"data source {self.config.name}: {self._file} is gone, of which {self._taken:,} documents were "
                    f"taken: put it back, so that the rest of it can be read"
                )
            files.sort(key=lambda file: file.name != self._file)
            if files[0].bytes != self._file_bytes:
                raise UserError(
                    f"data source {self.config.name}: {files[0].path} was {self._file_bytes:,} bytes when "
                    f"{self._taken:,} documents of it were taken, and is {files[0].bytes:,}: put it back as it was"
                )
        for file in files:
            if self._left <= 0:
                return
            yield from self._documents_of(file)
            self.place.finished.append(file.name)
            self._finished.add(file.name)
            self._file, self._taken, self._file_bytes = None, 0, 0
            self.place.file, self.place.taken, self.place.file_bytes = None, 0, 0

    def _documents_of(self, file: InputFile) -> Iterator[tuple[str, str, bytes]]:
        passed, self._file = self._taken, file.name
        self.place.file, self.place.file_bytes, self._file_bytes = file.name, file.bytes, file.bytes
        if self.config.format is SourceFormat.datasets:
            source = find_source(self.config)
        else:
            source = SourceFiles(config=replace(self.config, limit_bytes=None), files=(file,), passed_over=0)
        quiet = Tally([self.config.name])
        counted = self._reading.tally
        if passed:
            self._reading.tally = quiet
        for number, document in enumerate(documents(source, self._reading)):
            if number < passed:
                if number == passed - 1:
                    self._reading.tally = counted
                continue
            self._left -= len(document[2])
            if self._left < 0:
                return
            self._taken += 1
            self.place.taken = self._taken
            self.place.read_bytes += len(document[2])
            yield document
