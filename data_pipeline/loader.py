"""From a token store to batches: training without end, evaluation once over everything.

Idea: the order of training samples is a pure function of (seed, mixture, position); see `mixture` and `samples`. The
loader's whole state is therefore one small dict with the position in it, the same on every rank: it resumes at any
data-parallel size and any batch size, and every rank computes its own slice of the same global batch. The ledger,
real tokens of each source up to the position, is a formula too, not a count of what some rank happened to see.

Plain memory maps, no worker processes; `python -m benchmarks.loader` measures it.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import make_batch
from data_pipeline.config import Packing
from data_pipeline.mixture import Mixture, spread
from data_pipeline.samples import SourceStream
from data_pipeline.store import TRAINING, Store
from parallel.common.errors import ConfigError, Problem, UserError
from parallel.common.files import hash_bytes

logger = logging.getLogger(__name__)

STATE_VERSION = 1
_TOKENS_AT_ONCE = 1 << 17
"""Batches smaller than this are made several at a time, 4 MiB of tensors together."""
_BATCHES_AT_ONCE = 16


class Loader:
    """Batches of one data-parallel rank, from a position on, without end."""

    def __init__(
        self,
        store: Store,
        *,
        split: str = TRAINING,
        mixture: Mapping[str, float],
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        mask_documents: bool = True,
    ) -> None:
        """Opens the sources of the mixture.

        Args:
            store: A finished store.
            split: "training" or "validation".
            mixture: Weight of each source; a source that is not named is not used. Empty: in proportion to tokens.
            sequence_length: Labels in a sample.
            global_batch_size: Samples in one batch over all ranks.
            micro_batch_size: Every rank's rows are a multiple of it; what the global batch does not fill has weight 0.
            dp_rank: Which slice of the batch is wanted.
            dp_size: How many slices there are.
            seed: Keys every order.
            mask_documents: Whether positions and document ids tell the documents of a sample apart.

        Raises:
            ConfigError: the mixture names a source that the store lacks, or has no weight above 0.
            UserError: the split holds nothing, or an index is damaged.
        """
        tokens = tokens_by_source(store, split)
        self._mixture = Mixture(_weights(mixture, tokens, split), seed=seed)
        self._streams = [
            SourceStream(store, name, split=split, sequence_length=sequence_length, seed=seed)
            for name in self._mixture.sources
        ]
        self._store = store
        self._length = sequence_length
        self._global_batch_size = global_batch_size
        self._rows = rows_per_rank(global_batch_size, micro_batch_size, dp_size)
        self._first_row = dp_rank * self._rows
        self._mask_documents = mask_documents
        self._seed = seed
        self._position = 0
        self._ready: list[dict[str, Tensor]] = []
        self._fingerprint = {
            "store": _content_hash(store, split, self._mixture.sources),
            "split": split,
            "mixture": hash_bytes(json.dumps(self._mixture.quotas, ensure_ascii=False).encode()),
            "sequence_length": sequence_length,
            "packing": Packing.concatenate.value,
            "mask_documents": mask_documents,
        }
        if dp_rank == 0:
            _warn_of_waste(global_batch_size, self._rows * dp_size)

    @property
    def position(self) -> int:
        """Samples of the global order that were handed out."""
        return self._position

    @property
    def ledger(self) -> dict[str, int]:
        """Real tokens (labels of weight 1) of each source before the position, over all ranks."""
        counts = self._mixture.counts(self._position) * self._length
        return dict(zip(self._mixture.sources, counts.tolist(), strict=True))

    def next_batch(self) -> dict[str, Tensor]:
        """This rank's rows of the next global batch; keys and shapes as in `batch`."""
        if not self._ready:
            self._ready = self._make_batches()
        self._position += self._global_batch_size
        return self._ready.pop()

    def _make_batches(self) -> list[dict[str, Tensor]]:
        """Some batches from the position on, the next one last: small batches are made together, which is quicker."""
        count = min(max(1, _TOKENS_AT_ONCE // (self._rows * self._length)), _BATCHES_AT_ONCE)
        rows = np.arange(self._first_row, self._first_row + self._rows)
        starts = self._position + np.arange(count) * self._global_batch_size
        real = np.tile(rows < self._global_batch_size, count)
        sample_ids = np.where(real, np.add.outer(starts, rows).ravel(), -1)
        ids = np.zeros((len(sample_ids), self._length + 1), dtype=self._store.dtype)
        _fill(ids, np.flatnonzero(real), self._streams, *self._mixture.locate(sample_ids[real]))
        together = make_batch(
            ids,
            sample_ids=sample_ids,
            labels_in_row=np.where(real, self._length, 0),
            end_of_document=self._store.end_of_document,
            padding=self._store.padding,
            mask_documents=self._mask_documents,
        )
        split = [tensor.split(self._rows) for tensor in together.values()]
        return [dict(zip(together, tensors, strict=True)) for tensors in zip(*split, strict=True)][::-1]

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank; plain JSON, under 4 KiB with up to some 100 sources."""
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "position": self._position,
            "fingerprint": dict(self._fingerprint),
            "ledger": self.ledger,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at a state's position.

        Raises:
            UserError: the state belongs to another order; it says what differs.
        """
        if state["version"] != STATE_VERSION:
            raise UserError(f"the loader's state has version {state['version']}: expected {STATE_VERSION}")
        saved = {"seed": state["seed"], **state["fingerprint"]}
        own = {"seed": self._seed, **self._fingerprint}
        differences = [_difference(key, saved.get(key), own[key]) for key in own if saved.get(key) != own[key]]
        if differences:
            raise UserError(
                f"the checkpoint's order of samples is another one, its place in it means nothing here: "
                f"{', '.join(differences)}; restore what changed, or start a new run from its weights"
            )
        self._position = state["position"]
        self._ready = []
        assert self.ledger == state["ledger"]


def _difference(key: str, saved: object, own: object) -> str:
    if key == "store":
        return "the content of data.store changed"
    if key == "mixture":
        return "data.mixture changed"
    return f"{key} was {saved} and is {own}"


def rows_per_rank(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    """Rows that each data-parallel rank gets: its share, rounded up to whole micro-batches."""
    return -(-global_batch_size // (dp_size * micro_batch_size)) * micro_batch_size


def _warn_of_waste(samples: int, rows: int) -> None:
    if rows > samples:
        logger.warning(
            "a global batch of %d samples does not divide by ranks x micro-batch: %d rows of weight zero fill it up, "
            "%.1f%% of the work",
            samples,
            rows - samples,
            100 * (rows - samples) / rows,
        )


def tokens_by_source(store: Store, split: str) -> dict[str, int]:
    """Tokens of a split, {source: tokens}, sources without any left out."""
    tokens = {name: sum(shard.tokens for shard in store.shards(split=split, source=name)) for name in store.sources}
    return {name: count for name, count in tokens.items() if count}


def _weights(mixture: Mapping[str, float], tokens: Mapping[str, int], split: str) -> Mapping[str, float]:
    """The mixture as given, or by default the sources' tokens."""
    if not tokens:
        raise UserError(f"the token store has no {split} documents: build it from more text")
    problems = [
        Problem(key=f"data.mixture.{name}", got=weight, legal=f"a source of the store, one of {', '.join(tokens)}")
        for name, weight in mixture.items()
        if name not in tokens
    ]
    if problems:
        raise ConfigError(problems)
    return mixture or tokens


def _content_hash(store: Store, split: str, sources: tuple[str, ...]) -> str:
    """Hash of the tokens in use and their meaning: the shards' own hashes, in order, and the tokenizer's."""
    shards = [shard for name in sources for shard in store.shards(split=split, source=name)]
    hashes = [shard.files[f"{shard.stem}.{suffix}"]["hash"] for shard in shards for suffix in ("bin", "idx")]
    return hash_bytes(" ".join([store.tokenizer_fingerprint, *hashes]).encode())


def _fill(
    ids: NDArray[np.unsignedinteger],
    rows: NDArray[np.int64],
    streams: Sequence[SourceStream],
    sources: NDArray[np.int64],
    ordinals: NDArray[np.int64],
) -> None:
    """Reads the given samples of the given sources into some rows of `ids`; the last three are [rows]."""
    for source in np.unique(sources).tolist():
        here = sources == source
        ids[rows[here]] = streams[source].read(ordinals[here])


def single_pass(
    store: Store,
    split: str,
    *,
    sequence_length: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    mask_documents: bool = True,
) -> Iterator[dict[str, Tensor]]:
    """Batches in which every token of a split is predicted exactly once, for evaluation.

    The documents of each source stand in store order and are cut like training samples; the last row of a source is
    padded with weight zero. The rows of the sources are spread evenly over the batches, so that the first few batches
    are a fair sample of the whole. Every rank gets the same number of batches.

    Yields:
        A batch as in `batch`, with one more key: `source`, int64 [batch], the index into `store.sources` of the
        source that the row belongs to, or -1 in a row that only fills. `sample_ids` counts rows.

    Raises:
        UserError: the split holds nothing.
    """
    tokens = tokens_by_source(store, split)
    if not tokens:
        raise UserError(f"the token store has no {split} documents: build it from more text")
    streams = [SourceStream(store, name, split=split, sequence_length=sequence_length, seed=None) for name in tokens]
    totals = np.array(list(tokens.values()), dtype=np.int64)
    sources, ordinals = spread(-(-totals // sequence_length), np.full(len(totals), 0.5))
    in_store = np.array([store.sources.index(name) for name in tokens], dtype=np.int64)
    rows = rows_per_rank(global_batch_size, micro_batch_size, dp_size)
    slots = np.arange(dp_rank * rows, (dp_rank + 1) * rows)
    for first in range(0, len(sources), global_batch_size):
        real = np.flatnonzero(slots < min(global_batch_size, len(sources) - first))
        sample_ids = np.full(rows, -1, dtype=np.int64)
        sample_ids[real] = first + slots[real]
        kinds, numbers = sources[sample_ids[real]], ordinals[sample_ids[real]]
        ids = np.zeros((rows, sequence_length + 1), dtype=store.dtype)
        _fill(ids, real, streams, kinds, numbers)
        labels_in_row = np.zeros(rows, dtype=np.int64)
        labels_in_row[real] = np.minimum(totals[kinds] - numbers * sequence_length, sequence_length)
        source = np.full(rows, -1, dtype=np.int64)
        source[real] = in_store[kinds]
        batch = make_batch(
            ids,
            sample_ids=sample_ids,
            labels_in_row=labels_in_row,
            end_of_document=store.end_of_document,
            padding=store.padding,
            mask_documents=mask_documents,
        )
        yield {**batch, "source": torch.from_numpy(source)}
