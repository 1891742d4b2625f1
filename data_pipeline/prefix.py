"""Prefix language modelling: the beginning of each document is read whole, the rest is predicted token by token.

    document   EOD the furnace was lit before the ore came
    prefix      1   1     1     1   0     0     0   0   0      tokens that all see each other
    weights     0   0     0     1   1     1     1   1   1      the first label that counts is the first one unseen

Source: Liu et al., 2018, arXiv:1801.10198; Raffel et al., 2019, arXiv:1910.10683, section 3.2.1. How much is read is
drawn for each document from its length alone, every number as likely as any other, from one token (then it is a causal
model's sample) to all of them, by (seed, sample, document in the row).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Rows
from data_pipeline.masking import shares
from data_pipeline.sample_builder import Causal


class Prefix(Causal):
    """Rows of documents, of each of which the beginning is given; `prefix` bool [batch, sequence] says where."""

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        batch = super().batch(rows)
        given = np.zeros(batch["tokens"].shape, dtype=np.int64)  # tokens of each token's document that are read
        for row in np.flatnonzero(rows.sample_ids >= 0).tolist():
            sample, real = int(rows.sample_ids[row]), int(rows.labels_in_row[row])
            given[row] = self._given(batch["document_ids"][row].numpy(), real, sample)
        places, known = batch["positions"], torch.from_numpy(given)
        return batch | {
            "prefix": places < known,
            "loss_weights": batch["loss_weights"] * (places >= known - 1),
        }

    def _given(self, document_ids: NDArray[np.int32], real: int, sample: int) -> NDArray[np.int64]:
        """Of each token of a row, of which `real` are text, how many of its document are read."""
        begins = np.flatnonzero(np.diff(document_ids, prepend=-1))
        ends = np.append(begins[1:], len(document_ids))
        lengths = np.maximum(np.minimum(ends, real) - begins, 0)
        draws = shares(len(begins), "prefix", self._setting.seed, sample)
        given = np.where(lengths > 0, 1 + (draws * lengths).astype(np.int64), 0)
        return np.repeat(given, ends - begins)
