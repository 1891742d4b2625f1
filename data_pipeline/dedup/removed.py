"""What a deduplicating stage removes: a table of rows, each with the row that is kept for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.document import Parts
from data_pipeline.report import SAMPLES, Tally

_FILE = "removed.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Removal:
    """Removed rows, ascending; all arrays [removed]."""

    row: NDArray[np.int64]
    kept_row: NDArray[np.int64]
    jaccard: NDArray[np.float64]

    def write(self, directory: Path) -> None:
        """Puts the table into a stage's directory."""
        table = pa.table({"row": self.row, "kept_row": self.kept_row, "jaccard": self.jaccard})
        pq.write_table(table, directory / _FILE, compression="zstd", write_page_checksum=True)

    @classmethod
    def read(cls, directory: Path) -> "Removal":
        """The table of a finished stage."""
        table = pq.read_table(directory / _FILE, page_checksum_verification=True)
        return cls(**{name: table.column(name).to_numpy() for name in ("row", "kept_row", "jaccard")})


def count_removed(
    parts: Parts, candidates: NDArray[np.bool_], sizes: NDArray[np.int64], removal: Removal, reason: str
) -> dict[str, Any]:
    """Counts of a stage into which the rows `candidates` came; sizes are bytes of text; both [rows]."""
    tally = Tally(parts.sources)
    candidates = candidates.copy()
    sources = parts.source_of_row()
    leaves = np.zeros(parts.rows, dtype=bool)
    leaves[removal.row] = True
    for place in range(min(SAMPLES, len(removal.row))):
        row = int(removal.row[place])
        identifier, text = parts.document(row)
        kept = parts.ids(removal.kept_row[place : place + 1])[0]
        facts = {"kept_id": kept, "jaccard": float(removal.jaccard[place])}
        tally.drop(parts.sources[sources[row]], reason, identifier, int(sizes[row]), text, **facts)
        candidates[row] = False
    for number, source in enumerate(parts.sources):
        here = candidates & (sources == number)
        kept, gone = here & ~leaves, here & leaves
        tally.keep(source, int(kept.sum()), int(sizes[kept].sum()))
        if gone.any():
            tally.drop_many(source, reason, int(gone.sum()), int(sizes[gone].sum()))
    return tally.to_json()
