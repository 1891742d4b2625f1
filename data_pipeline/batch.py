"""A batch: what the loader hands to the engine, as a dict of CPU tensors whose first dimension is the sample.

tokens         int64   [batch, sequence]
labels         int64   [batch, sequence]   the next token of each
loss_weights   float32 [batch, sequence]   1 where the label counts, else 0
positions      int64   [batch, sequence]   restart at each segment (see `samples`)
document_ids   int32   [batch, sequence]   0, 1, 2 ... within the sample; attention never crosses
sample_ids     int64   [batch]             global position in the order; -1 in a row that only fills
source         int64   [batch]             index into the sources of the store; -1 in a row that only fills
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.samples import segments


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """What was read of the store for a batch."""

    ids: NDArray[np.unsignedinteger]
    """Each row's tokens and the one that follows, [batch, length + 1]."""
    sample_ids: NDArray[np.int64]
    """Position in the global order, -1 in a row that only fills, [batch]."""
    labels_in_row: NDArray[np.int64]
    """How many labels of each row count, from the left, [batch]."""
    segment_lengths: NDArray[np.int64] | None = None
    """Tokens after which a segment begins in any case, [batch]; None: nowhere."""


def make_batch(rows: Rows, *, end_of_document: int, padding: int, mask_documents: bool) -> dict[str, Tensor]:
    """Makes a batch of samples.

    Args:
        rows: Behind the labels that count, padding is put.
        end_of_document: Id that begins a segment.
        padding: Id that is put where nothing counts.
        mask_documents: Whether segments are told apart; otherwise a row is one.
    """
    count, length = rows.ids.shape[0], rows.ids.shape[1] - 1
    inputs, labels = rows.ids[:, :-1].astype(np.int64), rows.ids[:, 1:].astype(np.int64)
    weights = np.ones((count, length), dtype=np.float32)
    if (rows.labels_in_row < length).any():
        beyond = np.arange(length) >= rows.labels_in_row[:, None]
        inputs[beyond] = padding
        labels[beyond] = padding
        weights[beyond] = 0
    if mask_documents:
        positions, document_ids = segments(inputs, end_of_document, rows.segment_lengths)
    else:
        positions = np.tile(np.arange(length), (count, 1))
        document_ids = np.zeros((count, length), dtype=np.int32)
    arrays = {
        "tokens": inputs,
        "labels": labels,
        "loss_weights": weights,
        "positions": positions,
        "document_ids": document_ids,
        "sample_ids": rows.sample_ids,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
