"""From a token store to batches: training without end, evaluation once over everything.

Idea: the order of training samples is a pure function of (seed, schedule, position); see `schedule` and `samples`. The
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

from data_pipeline.batch import Rows
from data_pipeline.batch_sizes import BatchSizes, rows_per_rank
from data_pipeline.config import PhaseConfig
from data_pipeline.following import wait_for_growth
from data_pipeline.mixture import spread
from data_pipeline.plan import Plan
from data_pipeline.samples import Samples, SourceStream
from data_pipeline.schedule import Schedule
from data_pipeline.store import TRAINING, Shard, Store
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
        plan: Plan | None = None,
    ) -> None:
        """Opens the sources of the mixture in a finished store, or in one that grows, if the plan follows it.

        Args:
            store: What to read.
            split: "training" or "validation".
            mixture: Weight of each source; a source that is not named is not used. Empty: in proportion to tokens.
            sequence_length: Labels in a sample.
            global_batch_size: Samples in one batch over all ranks, at the end of the plan's ramp.
            micro_batch_size: Every rank's rows are a multiple of it; what the global batch does not fill has weight 0.
            dp_rank: Which slice of the batch is wanted.
            dp_size: How many slices there are.
            seed: Keys every order, and what a builder draws.
            mask_documents: Whether positions and document ids tell the documents of a sample apart.
            plan: Form of the samples, later phases, packing, transforms, following; None: plainly causal.

        Raises:
            ConfigError: the mixture names a source that the store lacks, or has no weight above 0.
            UserError: the split holds nothing, or an index is damaged.
        """
        plan = Plan() if plan is None else plan
        self._batch_sizes = BatchSizes(global_batch_size, plan.ramp)
        self._schedule = Schedule(
            _weights(mixture, plan.schedule, store, split), plan.schedule,
            seed=seed, batch_sizes=self._batch_sizes, sequence_length=sequence_length,
        )  # fmt: skip
        self._builder = plan.builder(store, sequence_length=sequence_length, seed=seed, mask_documents=mask_documents)
        self._length = self._builder.length
        self._streams = [
            plan.samples(self._builder, store, name, split=split, seed=seed) for name in self._schedule.sources
        ]
        self._store = store
        self._places = _places(store)
        self._split = split
        self._micro_batch_size, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size
        self._following = plan.following
        self._seed = seed
        self._position = 0
        self._jumped: list[list[int]] = []
        """Stretches of the global order, [first, last + 1], that were never trained on."""
        self._ready: list[dict[str, Tensor]] = []
        self._middle = plan.transform(store, seed=seed)
        self._options = {"sequence_length": sequence_length, "mask_documents": mask_documents, **plan.options()}
        if dp_rank == 0:
            for size in self._batch_sizes.sizes:
                _warn_of_waste(size, rows_per_rank(size, micro_batch_size, dp_size) * dp_size)

    @property
    def position(self) -> int:
        """Samples of the global order that were handed out."""
        return self._position

    @property
    def ledger(self) -> dict[str, int]:
        """Tokens of each source before the position that were labels of weight 1, over all ranks.

        Exact, but for what fill-in-the-middle pushes off the end of samples, or puts into their padding.
        """
        names = self._begun()
        ledger = {name: tokens for name, tokens in self._tokens_before(self._position).items() if name in names}
        for first, end in self._jumped:
            before = self._tokens_before(first)
            for name, tokens in self._tokens_before(end).items():
                if name in ledger:
                    ledger[name] -= tokens - before[name]
        return ledger

    @property
    def _trained(self) -> int:
        """Samples before the position that were not jumped over: what steps took, and so which sizes they have."""
        return self._position - sum(end - first for first, end in self._jumped)

    def _tokens_before(self, position: int) -> dict[str, int]:
        """Tokens of each source before a position, as if all of them had been trained on."""
        counts = self._schedule.counts(position).tolist()
        streams = zip(self._schedule.sources, self._streams, counts, strict=True)
        return {name: stream.tokens_before(count) for name, stream, count in streams}

    def jump(self, position: int) -> None:
        """Goes on at a later position; what lies between is noted, and the ledger does not count it."""
        assert position >= self._position, "a loader jumps forward"
        if position > self._position:
            self._jumped.append([self._position, position])
        self._position = position
        self._ready = []

    def next_batch(self) -> dict[str, Tensor]:
        """This rank's rows of the next global batch; keys and shapes as in `batch`, and `source` as in `single_pass`.

        Raises:
            UserError: the store did not grow in time.
        """
        if not self._ready:
            self._ready = self._make_batches()
        self._position += self._batch_sizes.at(self._trained)
        return self._ready.pop()

    def _make_batches(self) -> list[dict[str, Tensor]]:
        """Some batches from the position on, the next one last: small batches are made together, which is quicker."""
        size, alike = self._batch_sizes.at(self._trained), self._batch_sizes.alike(self._trained)
        own = rows_per_rank(size, self._micro_batch_size, self._dp_size)
        count = min(max(1, _TOKENS_AT_ONCE // (own * self._length)), alike or _BATCHES_AT_ONCE, _BATCHES_AT_ONCE)
        while True:
            rows = np.arange(self._dp_rank * own, (self._dp_rank + 1) * own)
            starts = self._position + np.arange(count) * size
            real = np.tile(rows < size, count)
            sample_ids = np.where(real, np.add.outer(starts, rows).ravel(), -1)
            sources, ordinals = self._schedule.locate(sample_ids[real])
            behind = self._behind(sources, ordinals)
            if behind is None:
                break
            if count == 1:
                self._wait(behind)
            count = 1
        ids = np.zeros((len(sample_ids), self._length + 1), dtype=self._store.dtype)
        labels = _fill(ids, real, self._streams, sources, ordinals)
        if self._middle is not None:
            for row, source in zip(np.flatnonzero(real).tolist(), sources.tolist(), strict=True):
                if self._middle.wants(self._schedule.sources[source]):
                    labels[row] = self._middle.apply(ids[row], int(labels[row]), int(sample_ids[row]))
        lengths = None
        if any(phase.segment_length for phase in self._schedule.phases):
            lengths = self._schedule.segment_lengths(np.maximum(sample_ids, 0), self._length)
        rows = Rows(ids=ids, sample_ids=sample_ids, labels_in_row=labels, segment_lengths=lengths)
        in_store = np.array([self._places.get(name, -1) for name in self._schedule.sources], dtype=np.int64)
        together = {**self._builder.batch(rows), "source": _placed(in_store[sources], real)}
        split = [tensor.split(own) for tensor in together.values()]
        return [dict(zip(together, tensors, strict=True)) for tensors in zip(*split, strict=True)][::-1]

    def _behind(self, sources: NDArray[np.int64], ordinals: NDArray[np.int64]) -> str | None:
        """A source that does not yet hold all of the samples asked for."""
        for source in np.unique(sources).tolist():
            ready = self._streams[source].ready
            if ready is not None and ordinals[sources == source].max() >= ready:
                return self._schedule.sources[source]
        return None

    def _wait(self, source: str) -> None:
        """Until a growing store has sealed something more."""
        if self._following is None:
            raise UserError(f"the store {self._store.path} still grows and {source} is used up: set data.follow=true")
        grown = wait_for_growth(self._store, source, self._split, self._following)
        self._store, self._places = grown, _places(grown)
        for stream in self._streams:
            stream.follow(grown)

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank; plain JSON, under 4 KiB with up to some 100 sources."""
        return {
            "version": STATE_VERSION,
            "seed": self._seed,
            "position": self._position,
            "fingerprint": self._fingerprint(),
            "ledger": self.ledger,
            "jumped": self._jumped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on at a state's position.

        Raises:
            UserError: the state belongs to another order; it says what differs.
        """
        if state["version"] != STATE_VERSION:
            raise UserError(f"the loader's state has version {state['version']}: expected {STATE_VERSION}")
        self._position, before = state["position"], self._position
        self._jumped = [list(stretch) for stretch in state.get("jumped", ())]
        saved = {"seed": state["seed"], **state["fingerprint"]}
        own = {"seed": self._seed, **self._fingerprint()}
        keys = dict.fromkeys([*own, *saved])
        differences = [_difference(key, saved.get(key), own.get(key)) for key in keys if saved.get(key) != own.get(key)]
        if differences:
            self._position = before
            raise UserError(
                f"the checkpoint's order of samples is another one, its place in it means nothing here: "
                f"{', '.join(differences)}; restore what changed, or start a new run from its weights"
            )
        self._ready = []
        assert self.ledger == state["ledger"]

    def _begun(self) -> set[str]:
        """Sources of the phases that had a say before the position."""
        return {name for phase in self._schedule.begun(self._position) for name in phase.mixture.sources}

    def _fingerprint(self) -> dict[str, Any]:
        """What decided the order up to the position: later phases, and shards sealed later, are left out."""
        begun = self._schedule.begun(self._position)
        first = begun[0]
        mixtures: Any = first.mixture.quotas
        if len(begun) > 1 or first.segment_length is not None:
            mixtures = [[phase.start, phase.origin, phase.mixture.quotas, phase.segment_length] for phase in begun]
        names, counts = self._begun(), self._schedule.counts(self._position).tolist()
        shards = []
        for name, stream, count in zip(self._schedule.sources, self._streams, counts, strict=True):
            if name in names:
                windows = stream.windows_begun(count)
                chosen = stream.shards if windows is None else stream.shards[: max(1, windows)]
                shards += [shard for window in chosen for shard in window]
        return {
            "store": _content_hash(self._store, shards),
            "split": self._split,
            "mixture": hash_bytes(json.dumps(mixtures, ensure_ascii=False).encode()),
            **self._options,
        }


def _difference(key: str, saved: object, own: object) -> str:
    if key == "store":
        return "the content of data.store changed"
    if key == "mixture":
        return "data.mixture changed"
    return f"{key} was {saved} and is {own}"


def _warn_of_waste(samples: int, rows: int) -> None:
    if rows > samples:
        logger.warning(
            "a global batch of %d samples does not divide by ranks x micro-batch: %d rows of weight zero fill it up, "
            "%.1f%% of the work",
            samples,
            rows - samples,
            100 * (rows - samples) / rows,
        )


def _places(store: Store) -> dict[str, int]:
    """{source: its index in the store}; a store that grows only adds some at the end."""
    return {name: place for place, name in enumerate(store.sources)}


def tokens_by_source(store: Store, split: str) -> dict[str, int]:
    """Tokens of a split, {source: tokens}, sources without any left out."""
    tokens = {name: sum(shard.tokens for shard in store.shards(split=split, source=name)) for name in store.sources}
    return {name: count for name, count in tokens.items() if count}


def _weights(
    mixture: Mapping[str, float], schedule: Sequence[PhaseConfig], store: Store, split: str
) -> Mapping[str, float]:
    """The mixture as given, or by default the sources' tokens."""
    tokens = tokens_by_source(store, split)
    if not tokens and store.ended:
        raise UserError(f"the token store has no {split} documents: build it from more text")
    given = [("data.mixture", mixture)]
    given += [(f"data.schedule.{number}.mixture", phase.mixture) for number, phase in enumerate(schedule)]
    problems = [
        Problem(key=f"{key}.{name}", got=weight, legal=f"a source of the store, one of {', '.join(tokens)}")
        for key, weights in given
        for name, weight in weights.items()
        if name not in tokens and store.ended
    ]
    if problems:
        raise ConfigError(problems)
    if not mixture and not store.ended and len(tokens) != 1:
        legal = "a share for each source: that of a store that still grows does not follow from its size"
        raise ConfigError([Problem(key="data.mixture", got={}, legal=legal)])
    return mixture or dict.fromkeys(tokens, 1) if not store.ended else mixture or tokens


def _content_hash(store: Store, shards: Sequence[Shard]) -> str:
    """Hash of the tokens in use and their meaning: the shards' own hashes, in order, and the tokenizer's."""
    hashes = [shard.files[f"{shard.stem}.{suffix}"]["hash"] for shard in shards for suffix in ("bin", "idx")]
    return hash_bytes(" ".join([store.tokenizer_fingerprint, *hashes]).encode())


def _fill(
    ids: NDArray[np.unsignedinteger],
    real: NDArray[np.bool_],
    streams: Sequence[Samples],
    sources: NDArray[np.int64],
    ordinals: NDArray[np.int64],
    *,
    once: bool = False,
) -> NDArray[np.int64]:
    """Reads samples into the `real` rows of `ids`; a source and an ordinal for each. `once`: labels beyond the first
    pass do not count.

    Returns:
        How many labels of each row count, [batch].
    """
    rows, labels = np.flatnonzero(real), np.zeros(len(ids), dtype=np.int64)
    for source in np.unique(sources).tolist():
        here = sources == source
        stream, into, wanted = streams[source], rows[here], ordinals[here]
        ids[into], labels[into] = stream.read_once(wanted) if once else stream.read(wanted)
    return labels


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
    plan: Plan | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Batches in which every token of a split is predicted exactly once, for evaluation.

    The documents of each source stand in store order and are cut like training samples; the last row of a source is
    padded with weight zero. The rows of the sources are spread evenly over the batches, so that the first few batches
    are a fair sample of the whole. Every rank gets the same number of batches. Of the plan only the form of the
    samples counts; what a builder draws is the same each time.

    Yields:
        A batch as in `batch`, with one more key: `source`, int64 [batch], the index into `store.sources` of the
        source that the row belongs to, or -1 in a row that only fills. `sample_ids` counts rows.

    Raises:
        UserError: the split holds nothing.
    """
    tokens = tokens_by_source(store, split)
    if not tokens:
        raise UserError(f"the token store has no {split} documents: build it from more text")
    builder = (plan or Plan()).builder(store, sequence_length=sequence_length, seed=0, mask_documents=mask_documents)
    streams = [
        builder.stream(store, name, split=split, seed=None)
        or SourceStream(store, name, split=split, sequence_length=builder.length, seed=None)
        for name in tokens
    ]
    samples = np.array([stream.samples_of_a_pass for stream in streams], dtype=np.int64)
    sources, ordinals = spread(samples, np.full(len(samples), 0.5))
    in_store = np.array([_places(store)[name] for name in tokens], dtype=np.int64)
    rows = rows_per_rank(global_batch_size, micro_batch_size, dp_size)
    slots = np.arange(dp_rank * rows, (dp_rank + 1) * rows)
    for first in range(0, len(sources), global_batch_size):
        real = slots < min(global_batch_size, len(sources) - first)
        sample_ids = np.where(real, first + slots, -1)
        kinds, numbers = sources[sample_ids[real]], ordinals[sample_ids[real]]
        ids = np.zeros((rows, builder.length + 1), dtype=store.dtype)
        labels = _fill(ids, real, streams, kinds, numbers, once=True)
        read = Rows(ids=ids, sample_ids=sample_ids, labels_in_row=labels)
        yield {**builder.batch(read), "source": _placed(in_store[kinds], real)}


def _placed(values: NDArray[np.int64], real: NDArray[np.bool_]) -> Tensor:
    """Values of the real rows, -1 in those that only fill, [batch]."""
    placed = np.full(len(real), -1, dtype=np.int64)
    placed[real] = values
    return torch.from_numpy(placed)
