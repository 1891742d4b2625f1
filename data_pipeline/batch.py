"""A batch: what the loader hands to the engine, as a dict of CPU tensors whose first dimension is the sample.

tokens         int64   [batch, sequence]
labels         int64   [batch, sequence]   the next token of each
loss_weights   float32 [batch, sequence]   1 where the label counts, else 0
positions      int64   [batch, sequence]   restart at each segment (see `samples`)
document_ids   int32   [batch, sequence]   0, 1, 2 ... within the sample; attention never crosses
sample_ids     int64   [batch]             global position in the order; -1 in a row that only fills
source         int64   [batch]             index into the sources of the store; -1 in a row that only fills
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.samples import segments


def make_batch(
    ids: NDArray[np.unsignedinteger],
    *,
    sample_ids: NDArray[np.int64],
    labels_in_row: NDArray[np.int64],
    end_of_document: int,
    padding: int,
    mask_documents: bool,
    segment_lengths: NDArray[np.int64] | None = None,
) -> dict[str, Tensor]:
    """Makes a batch of samples.

    Args:
        ids: Each row's tokens and the one that follows, [batch, sequence + 1].
        sample_ids: [batch].
        labels_in_row: How many labels of each row count, from the left, [batch]; behind them stands padding.
        end_of_document: Id that begins a segment.
        padding: Id that is put where nothing counts.
        mask_documents: Whether segments are told apart; otherwise a row is one.
        segment_lengths: Tokens after which a segment begins in any case, [batch]; None: nowhere.
    """
    rows, length = ids.shape[0], ids.shape[1] - 1
    inputs, labels = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
    weights = np.ones((rows, length), dtype=np.float32)
    if (labels_in_row < length).any():
        beyond = np.arange(length) >= labels_in_row[:, None]
        inputs[beyond] = padding
        labels[beyond] = padding
        weights[beyond] = 0
    if mask_documents:
        positions, document_ids = segments(inputs, end_of_document, segment_lengths)
    else:
        positions = np.tile(np.arange(length), (rows, 1))
        document_ids = np.zeros((rows, length), dtype=np.int32)
    arrays = {
        "tokens": inputs,
        "labels": labels,
        "loss_weights": weights,
        "positions": positions,
        "document_ids": document_ids,
        "sample_ids": sample_ids,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
