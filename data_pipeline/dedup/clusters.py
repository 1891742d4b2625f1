"""The table that people ask a deduplicator for: which kept document stands for each removed one."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.dedup.removed import Removal
from data_pipeline.document import Parts
from parallel.common.files import atomic_writer


def write_clusters(parts: Parts, removals: Mapping[str, Removal], path: Path) -> None:
    """Writes removed_id, kept_id, jaccard, removed_source, kept_source and stage of each removed document.

    A copy of a document that went as a near-duplicate has its twin's twin, so every kept_id is in the store.
    """
    stand_in = np.arange(parts.rows)
    similarity = np.ones(parts.rows)
    if "near" in removals:
        near = removals["near"]
        stand_in[near.row], similarity[near.row] = near.kept_row, near.jaccard
    removed = np.concatenate([np.zeros(0, np.int64), *(removal.row for removal in removals.values())])
    twins = np.concatenate([np.zeros(0, np.int64), *(removal.kept_row for removal in removals.values())])
    stages = np.concatenate([np.zeros(0, "U5"), *(np.full(len(r.row), name) for name, r in removals.items())])
    order = np.argsort(removed, kind="stable")
    removed, twins, stages = removed[order], twins[order], stages[order]
    kept = stand_in[twins]
    # A near-duplicate's own twin is kept; only a copy's twin may have gone, with the same text and so its similarity.
    jaccard = np.where(stages == "near", similarity[removed], similarity[twins])
    names = np.array(parts.sources, dtype=object)
    sources = parts.source_of_row()
    table = pa.table(
        {
            "removed_id": pa.array(parts.ids(removed), pa.string()),
            "kept_id": pa.array(parts.ids(kept), pa.string()),
            "jaccard": pa.array(jaccard, pa.float64()),
            "removed_source": pa.array(names[sources[removed]], pa.string()),
            "kept_source": pa.array(names[sources[kept]], pa.string()),
            "stage": pa.array(stages.tolist(), pa.string()),
        }
    )
    with atomic_writer(path) as file:
        pq.write_table(table, file, compression="zstd")
