"""Samples of one source: its documents in shuffled order, one after the other, cut at the sequence length.

Idea: a source is an endless stream of tokens, pass after pass over its documents, each pass in another order. Sample
n predicts tokens n*S to n*S + S - 1 of the stream (S = sequence length); its input is the same stretch, one token
earlier. So every token of every pass is predicted exactly once, a pass ends where its last token ends and not at a
border of samples, and nothing is dropped or padded.

Segments. In the store a document ENDS with an end-of-document token (EOD). In a sample a segment BEGINS with an EOD:
that of the document before, which has been predicted there as a label, stands as the beginning of the next one.

    stream          a0  a1  EOD b0  b1  b2  EOD c0  c1  c2  c3  EOD
    sample 0 input  EOD a0  a1 |EOD b0  b1
             label  a0  a1  EOD b0  b1  b2              the very first input is an EOD that the stream does not hold
         positions  0   1   2   0   1   2
      document_ids  0   0   0   1   1   1
    sample 1 input  b2 |EOD c0  c1  c2  c3
             label  EOD c0  c1  c2  c3  EOD             b is cut: its rest sees nothing before b2
         positions  0   0   1   2   3   4
      document_ids  0   1   1   1   1   1

The rule: a segment begins at the first input of a sample and at every input that is EOD. A pass begins likewise: the
token before it is the EOD of the last document of the pass before.

Order: the documents of a pass are permuted by (seed, split, source, window, epoch), and so are the samples that begin
in it, because neighbours in the stream are often parts of one long document. A window is a range of sealed shards
inside which order is shuffled; its number is part of the key, so that shards sealed later, as further windows, change
nothing that was decided. A finished store is one window. Evaluation reads the same stream unshuffled, in store order.

Cost: 16 bytes a document of the source, and for each of the last three passes 16 bytes a document and 8 a sample; no
token is touched one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.mixture import permutation
from data_pipeline.store import Shard, Store

_KEPT_PASSES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pieces:
    """Stretches of documents that, one after the other, are a stretch of the stream. All [pieces]."""

    sample: NDArray[np.int64]
    """Which of the samples asked for."""
    source_start: NDArray[np.int64]
    """First token, counted over all shards of the window."""
    length: NDArray[np.int64]


class Window:
    """A range of shards of one source and split: its documents as a table, and their order in each epoch."""

    def __init__(self, store: Store, shards: Sequence[Shard], *, purpose: tuple[str | int, ...] | None) -> None:
        """`purpose` keys every order: seed, split, source and number of the window; None keeps the store's order."""
        self._purpose = purpose
        self._ids = [np.asarray(store.tokens(shard)) for shard in shards]
        offsets = [store.document_offsets(shard) for shard in shards]
        tokens = [shard.tokens for shard in shards]
        self._shard_starts = np.cumsum([0, *tokens], dtype=np.int64)[:-1]
        self._starts = np.concatenate(
            [part[:-1] + start for part, start in zip(offsets, self._shard_starts, strict=True)]
        )
        self._lengths = np.concatenate([np.diff(part) for part in offsets])
        self.tokens: int = sum(tokens)
        self._orders: dict[int, tuple[NDArray[np.uint64], NDArray[np.int64]]] = {}

    def _order(self, epoch: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The documents in an epoch's order [documents], and where each begins in the epoch [documents + 1]."""
        if epoch not in self._orders:
            while len(self._orders) >= _KEPT_PASSES:
                del self._orders[next(iter(self._orders))]
            count = len(self._lengths)
            if self._purpose is None:
                order = np.arange(count, dtype=np.uint64)
            else:
                order = permutation(count, "documents", *self._purpose, epoch)
            begins = np.zeros(len(order) + 1, dtype=np.int64)
            np.cumsum(self._lengths[order], out=begins[1:])
            self._orders[epoch] = order, begins
        return self._orders[epoch]

    def pieces(self, epoch: int, samples: NDArray[np.int64], lo: NDArray[np.int64], hi: NDArray[np.int64]) -> _Pieces:
        """Finds the tokens lo to hi - 1 of an epoch, for each of several samples; all arguments [samples], lo < hi."""
        order, begins = self._order(epoch)
        first = np.searchsorted(begins, lo, side="right") - 1
        counts = np.searchsorted(begins, hi, side="left") - first
        skipped = np.repeat(np.cumsum(counts) - counts - first, counts)
        places = np.arange(len(skipped)) - skipped
        lo, hi = np.repeat(lo, counts), np.repeat(hi, counts)
        start = np.maximum(begins[places], lo)
        return _Pieces(
            sample=np.repeat(samples, counts),
            source_start=self._starts[order[places]] + start - begins[places],
            length=np.minimum(begins[places + 1], hi) - start,
        )

    def read(self, pieces: _Pieces) -> NDArray[np.unsignedinteger]:
        """The tokens of all pieces, one after the other."""
        shards = np.searchsorted(self._shard_starts, pieces.source_start, side="right") - 1
        starts = pieces.source_start - self._shard_starts[shards]
        spans = zip(shards.tolist(), starts.tolist(), (starts + pieces.length).tolist(), strict=True)
        return np.concatenate([self._ids[shard][start:stop] for shard, start, stop in spans])


class SourceStream:
    """The endless stream of one source and split, and its samples."""

    def __init__(self, store: Store, source: str, *, split: str, sequence_length: int, seed: int | None) -> None:
        """Maps the source's shards; reads their document lengths and no tokens. No seed, no shuffling.

        Raises:
            UserError: an index is damaged.
        """
        self._purpose = None if seed is None else (seed, split, source, 0)
        self._window = Window(store, store.shards(split=split, source=source), purpose=self._purpose)
        self._length = sequence_length
        self._dtype = store.dtype
        self._end_of_document = store.end_of_document
        self._sample_orders: dict[int, NDArray[np.uint64]] = {}

    @property
    def tokens(self) -> int:
        """Tokens of one pass."""
        return self._window.tokens

    def _first_sample(self, epoch: int) -> int:
        """The first sample that begins in an epoch or after it."""
        return -(-epoch * self.tokens // self._length)

    def _in_stream(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which sample of the stream comes as n-th: those that begin in one epoch are shuffled among themselves."""
        if self._purpose is None:
            return ordinals
        epochs = ordinals * self._length // self.tokens
        found = np.empty_like(ordinals)
        for epoch in np.unique(epochs).tolist():
            first = self._first_sample(epoch)
            if epoch not in self._sample_orders:
                while len(self._sample_orders) >= _KEPT_PASSES:
                    del self._sample_orders[next(iter(self._sample_orders))]
                count = self._first_sample(epoch + 1) - first
                self._sample_orders[epoch] = permutation(count, "samples", *self._purpose, epoch, self._length)
            here = epochs == epoch
            found[here] = first + self._sample_orders[epoch][ordinals[here] - first].astype(np.int64)
        return found

    def read(self, ordinals: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """The n-th samples of the source, for several n at once.

        Args:
            ordinals: Which samples, 0, 1, 2 ... without end; [samples].

        Returns:
            Ids, [samples, sequence_length + 1]: inputs without the last column, labels without the first.
        """
        stop = (self._in_stream(ordinals) + 1) * self._length
        start = stop - self._length - 1
        samples = np.arange(len(ordinals))
        before_all = start < 0
        start = np.maximum(start, 0)
        parts: list[_Pieces] = []
        epochs = range(int(start.min()) // self.tokens, int(stop.max() - 1) // self.tokens + 1)
        for epoch in epochs:
            base = epoch * self.tokens
            here = np.flatnonzero((start < base + self.tokens) & (stop > base))
            lo = np.maximum(start[here] - base, 0)
            hi = np.minimum(stop[here] - base, self.tokens)
            parts.append(self._window.pieces(epoch, samples[here], lo, hi))
        ids = self._window.read(_in_order(parts))
        if before_all.any():
            # Places in `ids` as it is, without the ends that go in before them.
            places = np.flatnonzero(before_all) * (self._length + 1) - np.arange(np.count_nonzero(before_all))
            ids = np.insert(ids, places, self._end_of_document)
        return ids.reshape(len(ordinals), self._length + 1)


def _in_order(parts: Sequence[_Pieces]) -> _Pieces:
    """Joins pieces of several epochs: by sample, and within a sample by epoch."""
    if len(parts) == 1:
        return parts[0]
    sample = np.concatenate([part.sample for part in parts])
    order = np.argsort(sample, kind="stable")
    return _Pieces(
        sample=sample[order],
        source_start=np.concatenate([part.source_start for part in parts])[order],
        length=np.concatenate([part.length for part in parts])[order],
    )


def segments(inputs: NDArray[np.integer], end_of_document: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Positions within the segment, and number of the segment within the sample, of every input.

    Args:
        inputs: Ids, [samples, sequence].
        end_of_document: Id that begins a segment.

    Returns:
        positions int64 and document_ids int32, both [samples, sequence].
    """
    length = inputs.shape[1]
    begins = inputs == end_of_document
    begins[:, 0] = True
    borders = np.flatnonzero(begins)
    lengths = np.diff(borders, append=inputs.size)
    first_of_row = np.flatnonzero(borders % length == 0)
    numbers = np.arange(len(borders)) - first_of_row[borders // length]
    positions = np.arange(inputs.size)
    positions -= np.repeat(borders, lengths)
    document_ids = np.repeat(numbers.astype(np.int32), lengths)
    return positions.reshape(inputs.shape), document_ids.reshape(inputs.shape)
