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
nothing that was decided. What one build made is one window; what a growing store seals is one window a shard, and a
pass goes through the windows in their order. Evaluation reads the same stream unshuffled, in store order.

Cost: 16 bytes a document of the source, and for each of the last three passes 16 bytes a document and 8 a sample; no
token is touched one by one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    window: NDArray[np.int64]
    """Which of the source's windows."""
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

    def pieces(
        self, number: int, epoch: int, samples: NDArray[np.int64], lo: NDArray[np.int64], hi: NDArray[np.int64]
    ) -> _Pieces:
        """Finds the tokens lo to hi - 1 of an epoch, for each of several samples; arrays [samples], lo < hi.

        `number` is the window's own.
        """
        order, begins = self._order(epoch)
        first = np.searchsorted(begins, lo, side="right") - 1
        counts = np.searchsorted(begins, hi, side="left") - first
        skipped = np.repeat(np.cumsum(counts) - counts - first, counts)
        places = np.arange(len(skipped)) - skipped
        lo, hi = np.repeat(lo, counts), np.repeat(hi, counts)
        start = np.maximum(begins[places], lo)
        return _Pieces(
            sample=np.repeat(samples, counts),
            window=np.full(len(places), number, dtype=np.int64),
            source_start=self._starts[order[places]] + start - begins[places],
            length=np.minimum(begins[places + 1], hi) - start,
        )

    def documents(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token of each document, counted over all shards of the window, and its tokens; both [documents]."""
        return self._starts, self._lengths

    def stretches(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
        """The tokens of some stretches, one after the other; both arguments [stretches]."""
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        starts = starts - self._shard_starts[shards]
        spans = zip(shards.tolist(), starts.tolist(), (starts + lengths).tolist(), strict=True)
        return np.concatenate([self._ids[shard][start:stop] for shard, start, stop in spans])


class Samples(ABC):
    """The samples of one source and split: its windows, and what the loader asks of them."""

    def __init__(self, store: Store, source: str, *, split: str, seed: int | None) -> None:
        """Maps the source's shards; reads their document lengths and no tokens. No seed, no shuffling.

        Raises:
            UserError: an index is damaged.
        """
        self.name = source
        self.dtype = store.dtype
        self.end_of_document = store.end_of_document
        self._split = split
        self._seed = seed
        self.windows: list[Window] = []
        self.shards: list[tuple[Shard, ...]] = []
        """The shards of each window."""
        self.final = False
        """The store has ended: no window comes any more, and the passes repeat."""
        self._take(store)

    def purpose(self, window: int) -> tuple[str | int, ...]:
        """Keys every order inside a window."""
        assert self._seed is not None
        return (self._seed, self._split, self.name, window)

    def follow(self, store: Store) -> None:
        """Takes over what was sealed since, from the same store read again."""
        self._take(store)
        self.grown()

    def _take(self, store: Store) -> None:
        found = store.windows(split=self._split, source=self.name)
        if self._seed is None:
            found = [tuple(shard for window in found for shard in window)]
        for number in range(len(self.windows), len(found)):
            purpose = None if self._seed is None else self.purpose(number)
            self.windows.append(Window(store, found[number], purpose=purpose))
            self.shards.append(found[number])
        self.final = store.ended

    @abstractmethod
    def grown(self) -> None:
        """Windows were added."""

    @property
    @abstractmethod
    def ready(self) -> int | None:
        """Samples that can be read now; None where there is no end."""

    @abstractmethod
    def windows_begun(self, count: int) -> int | None:
        """Windows from which the first `count` samples took something; None in a second pass, which takes from all."""

    @abstractmethod
    def tokens_before(self, count: int) -> int:
        """Labels of weight 1 in the first `count` samples."""

    @abstractmethod
    def read(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """The n-th samples of the source, for several n at once.

        Args:
            ordinals: Which samples, 0, 1, 2 ... without end; [samples].

        Returns:
            Ids, [samples, sequence_length + 1]: inputs without the last column, labels without the first. And how
            many labels of each row count, from the left, [samples].
        """

    @property
    @abstractmethod
    def samples_of_a_pass(self) -> int:
        """Samples that together hold everything once."""

    def read_once(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """As `read`, of the first pass alone: what the last sample has of the second one does not count."""
        return self.read(ordinals)


class SourceStream(Samples):
    """The endless stream of one source and split, cut into samples."""

    def __init__(self, store: Store, source: str, *, split: str, sequence_length: int, seed: int | None) -> None:
        super().__init__(store, source, split=split, seed=seed)
        self._length = sequence_length
        self._sample_orders: dict[int, NDArray[np.uint64]] = {}
        self.grown()

    def grown(self) -> None:
        self._ends = np.cumsum([0, *(window.tokens for window in self.windows)], dtype=np.int64)

    @property
    def tokens(self) -> int:
        """Tokens of one pass, as far as it is sealed."""
        return int(self._ends[-1])

    @property
    def ready(self) -> int | None:
        if self.final:
            return None
        # All samples that begin in a window are shuffled, so its last one has to be whole.
        firsts = -(-self._ends // self._length)
        return int(firsts[firsts * self._length <= self._ends[-1]][-1])

    def windows_begun(self, count: int) -> int | None:
        if not count:
            return 0
        last = (count - 1) * self._length
        if last >= self._ends[-1]:
            return None
        begun = int(np.searchsorted(self._ends, last, side="right"))
        # The last sample that begins in a window may stand anywhere among its samples, and reaches into the next one.
        edge = -(-int(self._ends[begun]) // self._length) * self._length
        return None if edge > self._ends[-1] else int(np.searchsorted(self._ends, edge, side="left"))

    @property
    def samples_of_a_pass(self) -> int:
        return -(-self.tokens // self._length)

    def read_once(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        ids, _ = self.read(ordinals)
        return ids, np.minimum(self.tokens - ordinals * self._length, self._length)

    def tokens_before(self, count: int) -> int:
        return count * self._length

    def _begin(self, stretch: int) -> int:
        """First token of the stream in a stretch: one window in one pass, numbered through."""
        epoch, window = divmod(stretch, len(self.windows))
        return epoch * self.tokens + int(self._ends[window])

    def _stretches(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The stretch in which each token of the stream lies."""
        epochs, places = np.divmod(tokens, self.tokens)
        return epochs * len(self.windows) + np.searchsorted(self._ends, places, side="right") - 1

    def _first_sample(self, stretch: int) -> int:
        """The first sample that begins in a stretch or after it."""
        return -(-self._begin(stretch) // self._length)

    def _in_stream(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which sample of the stream comes as n-th: those that begin in one stretch are shuffled among themselves."""
        if self._seed is None:
            return ordinals
        stretches = self._stretches(ordinals * self._length)
        found = np.empty_like(ordinals)
        for stretch in np.unique(stretches).tolist():
            first = self._first_sample(stretch)
            if stretch not in self._sample_orders:
                while len(self._sample_orders) >= _KEPT_PASSES:
                    del self._sample_orders[next(iter(self._sample_orders))]
                epoch, window = divmod(stretch, len(self.windows))
                count = self._first_sample(stretch + 1) - first
                order = permutation(count, "samples", *self.purpose(window), epoch, self._length)
                self._sample_orders[stretch] = order
            here = stretches == stretch
            found[here] = first + self._sample_orders[stretch][ordinals[here] - first].astype(np.int64)
        return found

    def read(self, ordinals: NDArray[np.int64]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        stop = (self._in_stream(ordinals) + 1) * self._length
        start = stop - self._length - 1
        samples = np.arange(len(ordinals))
        before_all = start < 0
        start = np.maximum(start, 0)
        parts: list[_Pieces] = []
        last = int(self._stretches(stop - 1).max())
        for stretch in range(int(self._stretches(start).min()), last + 1):
            epoch, number = divmod(stretch, len(self.windows))
            base, window = self._begin(stretch), self.windows[number]
            here = np.flatnonzero((start < base + window.tokens) & (stop > base))
            if len(here):
                lo = np.maximum(start[here] - base, 0)
                hi = np.minimum(stop[here] - base, window.tokens)
                parts.append(window.pieces(number, epoch, samples[here], lo, hi))
        ids = self._gather(_in_order(parts))
        if before_all.any():
            # Places in `ids` as it is, without the ends that go in before them.
            places = np.flatnonzero(before_all) * (self._length + 1) - np.arange(np.count_nonzero(before_all))
            ids = np.insert(ids, places, self.end_of_document)
        labels = np.full(len(ordinals), self._length, dtype=np.int64)
        return ids.reshape(len(ordinals), self._length + 1), labels

    def _gather(self, pieces: _Pieces) -> NDArray[np.unsignedinteger]:
        """The tokens of all pieces, one after the other."""
        if len(self.windows) == 1:
            return self.windows[0].stretches(pieces.source_start, pieces.length)
        runs = np.flatnonzero(np.diff(pieces.window, prepend=-1))
        return np.concatenate(
            [
                self.windows[int(pieces.window[first])].stretches(
                    pieces.source_start[first:stop], pieces.length[first:stop]
                )
                for first, stop in pairwise([*runs.tolist(), len(pieces.window)])
            ]
        )


def _in_order(parts: Sequence[_Pieces]) -> _Pieces:
    """Joins pieces of several epochs: by sample, and within a sample by epoch."""
    if len(parts) == 1:
        return parts[0]
    sample = np.concatenate([part.sample for part in parts])
    order = np.argsort(sample, kind="stable")
    return _Pieces(
        sample=sample[order],
        window=np.concatenate([part.window for part in parts])[order],
        source_start=np.concatenate([part.source_start for part in parts])[order],
        length=np.concatenate([part.length for part in parts])[order],
    )


def segments(
    inputs: NDArray[np.integer], end_of_document: int, lengths: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Positions within the segment, and number of the segment within the sample, of every input.

    Args:
        inputs: Ids, [samples, sequence].
        end_of_document: Id that begins a segment.
        lengths: Tokens after which a segment begins in any case, [samples]; None: nowhere.

    Returns:
        positions int64 and document_ids int32, both [samples, sequence].
    """
    length = inputs.shape[1]
    begins = inputs == end_of_document
    begins[:, 0] = True
    for every in np.unique(lengths).tolist() if lengths is not None else []:
        begins[np.flatnonzero(lengths == every)[:, None], np.arange(0, length, every)] = True
    borders = np.flatnonzero(begins)
    lengths = np.diff(borders, append=inputs.size)
    first_of_row = np.flatnonzero(borders % length == 0)
    numbers = np.arange(len(borders)) - first_of_row[borders // length]
    positions = np.arange(inputs.size)
    positions -= np.repeat(borders, lengths)
    document_ids = np.repeat(numbers.astype(np.int32), lengths)
    return positions.reshape(inputs.shape), document_ids.reshape(inputs.shape)
