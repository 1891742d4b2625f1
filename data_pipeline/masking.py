"""Masked language modelling: some tokens are covered, and predicted from all others.

    EOD the furnace was |EOD ore and char coal       ->   EOD the MASK was |EOD ore and MASK MASK
                                     weights              0   0   1    0    0   0   0   1    1

Of the chosen tokens 80 % become the mark, 10 % a random token and 10 % stay as they are (Devlin et al., 2018,
arXiv:1810.04805, section 3.1). Which are chosen is drawn for each sample of the global order, so that every pass
covers others (Liu et al., 2019, arXiv:1907.11692), and depends on (seed, sample) alone. With `whole_words` all tokens
of a word are chosen together. Special tokens, the ends of documents among them, are never chosen.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Rows
from data_pipeline.corruption import MaskingConfig
from data_pipeline.marks import Marks, marks
from data_pipeline.mixture import random_bits
from data_pipeline.sample_builder import Causal, Setting


def shares(count: int, *purpose: str | int) -> NDArray[np.float64]:
    """Random numbers from 0 to below 1 that depend on a purpose alone."""
    return (random_bits(count, *purpose) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Masking:
    """Covers tokens of rows."""

    def __init__(self, found: Marks, settings: MaskingConfig, *, seed: int) -> None:
        self._marks = found
        self._settings = settings
        self._seed = seed

    def cover(self, tokens: NDArray[np.int64], sample: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens [length] of one sample as the model sees them, and which of them it is to predict."""
        settings, places = self._settings, np.flatnonzero(self._marks.is_ordinary[tokens])
        draws = shares(3 * len(tokens), "masking", self._seed, sample).reshape(3, -1)
        chosen = np.zeros(len(tokens), dtype=np.bool_)
        chosen[self._choose(tokens, places, draws[0])] = True
        covered = tokens.copy()
        covered[chosen & (draws[1] < settings.covered)] = self._marks.mask
        other = chosen & (draws[1] >= settings.covered) & (draws[1] < settings.covered + settings.exchanged)
        ordinary = self._marks.ordinary
        covered[other] = ordinary[(draws[2][other] * len(ordinary)).astype(np.int64)]
        return covered, chosen

    def _choose(
        self, tokens: NDArray[np.int64], places: NDArray[np.int64], draws: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Places of about `share` of the ordinary tokens, at least one: words in random order, none too many."""
        if not len(places):
            return places
        budget = max(1, round(self._settings.share * len(places)))
        if not self._settings.whole_words:
            return places[np.argsort(draws[places], kind="stable")[:budget]]
        begins = self._marks.word_begins(tokens)
        words = (np.cumsum(begins) - 1)[places]  # of each place
        names, first, sizes = np.unique(words, return_index=True, return_counts=True)
        order = np.argsort(draws[places[first]], kind="stable")
        fitting = max(1, int(np.searchsorted(np.cumsum(sizes[order]), budget, side="right")))
        return places[np.isin(words, names[order[:fitting]])]


class Masked(Causal):
    """Rows of documents, one after the other, some of whose tokens are covered."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._masking = Masking(marks(setting.store), setting.masking, seed=setting.seed)

    def batch(self, rows: Rows) -> dict[str, Tensor]:
        batch = super().batch(rows)
        return batch | cover_rows(self._masking, batch["tokens"].numpy(), rows.sample_ids)


def cover_rows(masking: Masking, tokens: NDArray[np.int64], sample_ids: NDArray[np.int64]) -> dict[str, Tensor]:
    """`tokens`, `labels` and `loss_weights` of rows [batch, length]; padding and rows that fill count nothing."""
    covered, weights = tokens.copy(), np.zeros(tokens.shape, dtype=np.float32)
    for row in np.flatnonzero(sample_ids >= 0).tolist():
        covered[row], weights[row] = masking.cover(tokens[row], int(sample_ids[row]))
    found = {"tokens": covered, "labels": tokens, "loss_weights": weights}
    return {name: torch.from_numpy(array) for name, array in found.items()}
