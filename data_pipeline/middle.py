"""Fill-in-the-middle: some documents of a sample become prefix, suffix, middle (Bavarian et al. 2022).

    EOD a b c d e f        ->   EOD <PRE> a b <SUF> e f <MID> c d          or, suffix first,
                                EOD <PRE> <SUF> e f <MID> a b c d

The borders are drawn in tokens, and whether and where depends on (seed, sample, document) alone. Only documents that
stand in the sample whole, from their beginning to their end, are turned. Each takes three tokens more, so as many
labels fall off the end of the sample: with a rate of 0.5 and documents of 500 tokens 0.3 % of them. The marks are the
first three reserved tokens of the tokenizer.
"""

import json
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import FillInTheMiddleConfig
from data_pipeline.mixture import random_bits
from data_pipeline.store import Store
from parallel.common.errors import UserError

_MARKS = ("<|reserved_00|>", "<|reserved_01|>", "<|reserved_02|>")
"""Prefix, suffix, middle."""
_SHORTEST = 3


class FillInTheMiddle:
    """The transform of samples."""

    def __init__(self, store: Store, settings: FillInTheMiddleConfig, *, seed: int) -> None:
        """Looks up the marks in the store's tokenizer.

        Raises:
            UserError: it has no reserved tokens.
        """
        added = {token["content"]: token["id"] for token in json.loads(store.tokenizer.read_bytes())["added_tokens"]}
        if not all(mark in added for mark in _MARKS):
            raise UserError(f"data.fill_in_the_middle needs the tokens {', '.join(_MARKS)} in {store.tokenizer}")
        self._marks = np.array([added[mark] for mark in _MARKS], dtype=store.dtype)
        self._end_of_document = store.end_of_document
        self._settings = settings
        self._seed = seed

    def wants(self, source: str) -> bool:
        """Documents of this source are turned."""
        wanted: Collection[str] = self._settings.sources
        return not wanted or source in wanted

    def apply(self, ids: NDArray[np.unsignedinteger], labels: int, sample: int) -> int:
        """Turns documents of one sample in place.

        Args:
            ids: Its tokens and the one that follows, [sequence + 1].
            labels: How many labels count.
            sample: Its position in the order, which keys the draws.

        Returns:
            How many labels count now: where the sample had padding, more.
        """
        real = ids[: labels + 1]
        ends = np.flatnonzero(real == self._end_of_document)
        if len(ends) < 2:
            return labels
        words = random_bits(4 * (len(ends) - 1), "middle", self._seed, sample).reshape(-1, 4)
        shares = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        parts: list[NDArray[np.unsignedinteger]] = [real[: ends[0] + 1]]
        turned = 0
        for first, last, draw in zip(ends[:-1].tolist(), ends[1:].tolist(), shares, strict=True):
            document = real[first + 1 : last]
            if draw[0] < self._settings.rate and len(document) >= _SHORTEST:
                document = self._turned(document, draw)
                turned += 1
            parts += [document, real[last : last + 1]]
        if not turned:
            return labels
        parts.append(real[ends[-1] + 1 :])
        joined = np.concatenate(parts)[: len(ids)]
        ids[: len(joined)] = joined
        return len(joined) - 1

    def _turned(self, document: NDArray[np.unsignedinteger], draw: NDArray[np.float64]) -> NDArray[np.unsignedinteger]:
        low, high = np.sort((draw[1:3] * (len(document) + 1)).astype(np.int64))
        prefix, middle, suffix = document[:low], document[low:high], document[high:]
        before, after, between = self._marks[:1], self._marks[1:2], self._marks[2:]
        if draw[3] < self._settings.suffix_first:
            return np.concatenate([before, after, suffix, between, prefix, middle])
        return np.concatenate([before, prefix, after, suffix, between, middle])
