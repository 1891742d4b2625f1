"""Schedules, packing and transforms: weights that change, sources that come later, resuming anywhere."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.config import FillInTheMiddleConfig, Packing, PhaseConfig
from data_pipeline.loader import Loader
from data_pipeline.middle import FillInTheMiddle
from data_pipeline.packing import best_fit
from data_pipeline.plan import Plan
from data_pipeline.store import Store, StoreWriter
from parallel.common.errors import ConfigError, UserError
from tests.data_pipeline.stores import END, distinct_documents, make_store, small_tokenizer, tokenized

SOURCES = {
    "web": distinct_documents([11, 3, 40, 0, 17, 5], 100),
    "code": distinct_documents([25, 8], 1000),
    "books": distinct_documents([90, 7], 2000),
}
LENGTH, BATCH = 16, 6
SCHEDULE = (
    PhaseConfig(from_step=4, mixture={"web": 0.2, "code": 0.8}),
    PhaseConfig(from_step=7, mixture={"web": 0.3, "code": 0.3, "books": 0.4}, sequence_length=8),
    PhaseConfig(from_step=11, mixture={"books": 1.0}),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("schedule") / "store", SOURCES, shard_tokens=30)


def loader(store: Store, **changes: Any) -> Loader:
    arguments: dict[str, Any] = {
        "mixture": {"web": 0.6, "code": 0.4},
        "sequence_length": LENGTH,
        "global_batch_size": BATCH,
        "micro_batch_size": 1,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 7,
        "schedule": SCHEDULE,
    }
    arguments |= changes
    plan = {field: arguments.pop(field) for field in Plan.__slots__ if field in arguments}
    return Loader(store, **arguments, plan=Plan(**plan))


def real(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return {name: tensor[whole["sample_ids"] >= 0] for name, tensor in whole.items()}


def labels_of(batch: dict[str, Tensor]) -> list[int]:
    return batch["labels"][batch["loss_weights"] > 0].tolist()


@pytest.mark.parametrize("packing", list(Packing))
def test_resuming_at_any_step_of_a_schedule_at_any_size(store: Store, packing: Packing) -> None:
    """Two epochs and more of mixed and packed sources, weights changed and a source appended on the way."""
    steps = 18
    whole = loader(store, packing=packing)
    states, batches = [whole.state_dict()], []
    for _ in range(steps):
        batches.append(whole.next_batch())
        states.append(json.loads(json.dumps(whole.state_dict())))
    seen = Counter(label for batch in batches for label in labels_of(batch))
    assert sum(states[-1]["ledger"].values()) == sum(seen.values())
    for name, documents in SOURCES.items():
        ids = {token for document in documents for token in document}
        size = sum(len(document) + 1 for document in documents)
        passes, rest = divmod(states[-1]["ledger"][name], size)
        assert passes >= (1 if name == "books" else 2)
        # A pass holds everything once, whatever the weights were when: only the one that runs is incomplete.
        counts = [seen[token] for token in ids]
        slack = -(-LENGTH // size)
        assert min(counts) >= passes - slack
        assert max(counts) <= passes + 1 + slack
        assert rest < size
    for dp_size in (1, 2, 4):
        for step in range(steps):
            ranks = [loader(store, packing=packing, dp_size=dp_size, dp_rank=rank) for rank in range(dp_size)]
            for rank in ranks:
                rank.load_state_dict(states[step])
            found = real([rank.next_batch() for rank in ranks])
            assert all(torch.equal(found[name], batches[step][name]) for name in found)
            assert ranks[-1].state_dict() == states[step + 1]


def test_a_source_goes_on_where_the_phase_before_left_it(store: Store) -> None:
    """Samples of one source over all phases are its samples in their order: nothing is lost, nothing comes twice."""
    scheduled, alone = loader(store), {name: loader(store, mixture={name: 1}, schedule=()) for name in SOURCES}
    rows: dict[str, list[list[int]]] = {name: [] for name in SOURCES}
    for _ in range(15):
        for labels in scheduled.next_batch()["labels"].tolist():
            token = next(label for label in labels if label != END)
            name = next(name for name, texts in SOURCES.items() if any(token in text for text in texts))
            rows[name].append(labels)
    for name, own in alone.items():
        expected = [row for _ in range(15) for row in own.next_batch()["labels"].tolist()]
        assert len(rows[name]) > 10
        assert rows[name] == expected[: len(rows[name])]


def test_only_what_lies_ahead_may_change(store: Store) -> None:
    plain = loader(store, schedule=())
    for _ in range(4):
        plain.next_batch()
    state = plain.state_dict()
    changed = loader(store)
    changed.load_state_dict(state)
    assert changed.state_dict() == state
    changed.next_batch()
    later = changed.state_dict()
    with pytest.raises(UserError, match=r"data\.mixture changed"):
        loader(store, schedule=()).load_state_dict(later)
    with pytest.raises(UserError, match=r"data\.mixture changed"):
        loader(store, schedule=(PhaseConfig(from_step=2, mixture={"web": 1}),)).load_state_dict(state)


def test_a_source_may_come_into_the_store_while_a_run_lasts(tmp_path: Path) -> None:
    small = make_store(tmp_path / "small", {name: SOURCES[name] for name in ("web", "code")}, shard_tokens=30)
    run = loader(small, schedule=())
    before = [run.next_batch() for _ in range(4)]
    larger = make_store(tmp_path / "larger", SOURCES, shard_tokens=30)
    appended = loader(larger)
    appended.load_state_dict(run.state_dict())
    assert len(before) == 4
    whole = loader(larger)
    expected = [whole.next_batch() for _ in range(10)]
    for batch in expected[4:]:
        assert torch.equal(appended.next_batch()["tokens"], batch["tokens"])
    changed = {**SOURCES, "web": distinct_documents([11, 3, 40, 0, 17, 6], 100)}
    with pytest.raises(UserError, match=r"content of data\.store changed"):
        loader(make_store(tmp_path / "changed", changed, shard_tokens=30)).load_state_dict(run.state_dict())


def test_short_contexts_keep_the_tokens_and_their_order(store: Store) -> None:
    short = (PhaseConfig(from_step=2, sequence_length=4), PhaseConfig(from_step=4, sequence_length=LENGTH))
    plain, cut = loader(store, schedule=()), loader(store, schedule=short)
    for step in range(6):
        ours, theirs = cut.next_batch(), plain.next_batch()
        same = step not in (2, 3)
        assert torch.equal(ours["tokens"], theirs["tokens"])
        assert torch.equal(ours["positions"], theirs["positions"]) == same
        if not same:
            assert int(ours["positions"].max()) < 4
            starts = ours["positions"] == 0
            assert bool(starts[:, ::4].all())
            assert torch.equal(ours["document_ids"], (starts.cumsum(1) - 1).int())


def test_phases_of_unknown_sources_are_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"data\.schedule\.0\.mixture\.none is 1\.0"):
        loader(store, schedule=(PhaseConfig(from_step=1, mixture={"none": 1.0}),))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80),
    most=st.integers(1, 5),
)
def test_bins_hold_what_fits_and_the_best_bin_is_taken(lengths: list[int], most: int) -> None:
    sizes = np.array(lengths)
    bins = best_fit(sizes, 30, most)
    held = np.bincount(bins, weights=sizes).astype(int)
    assert held.max() <= 30
    assert np.bincount(bins).max() <= most
    # The walk again, in plain words.
    rooms: list[int] = []
    counts: list[int] = []
    placed = np.empty(len(sizes), dtype=int)
    for piece in np.argsort(-sizes, kind="stable"):
        fitting = [n for n, room in enumerate(rooms) if room >= sizes[piece] and counts[n] < most]
        best = min((rooms[n] for n in fitting), default=None)
        if best is None:
            rooms.append(30)
            counts.append(0)
            fitting, best = [len(rooms) - 1], 30
        chosen = int(bins[piece])
        assert chosen in fitting
        assert rooms[chosen] == best
        rooms[chosen] -= int(sizes[piece])
        counts[chosen] += 1
        placed[piece] = chosen
    assert np.array_equal(placed, bins)


def test_packed_sequences_hold_whole_documents(store: Store) -> None:
    packed = loader(store, packing=Packing.best_fit, schedule=(), mixture={"web": 1}, max_documents_per_sequence=2)
    size = sum(len(document) + 1 for document in SOURCES["web"])
    seen: Counter[int] = Counter()
    while packed.ledger["web"] < 2 * size:
        batch = packed.next_batch()
        for tokens, labels, weights, ids in zip(
            *(batch[n].tolist() for n in ("tokens", "labels", "loss_weights", "document_ids")), strict=True
        ):
            count = int(sum(weights))
            assert weights == [1.0] * count + [0.0] * (LENGTH - count)
            assert tokens[0] == END
            assert labels[: count - 1] == tokens[1:count]
            assert max(ids[:count]) < 2
            seen.update(labels[:count])
    assert packed.ledger["web"] == sum(seen.values())
    assert {seen[token] for document in SOURCES["web"] for token in document} <= {2, 3}


def test_the_middle_is_taken_out_and_nothing_else_changes(store: Store, tmp_path: Path) -> None:
    documents = {"web": distinct_documents([10, 9, 20, 6], 100), "code": distinct_documents([12, 30, 5], 1000)}
    mixed = make_store(tmp_path / "store", documents)
    settings = FillInTheMiddleConfig(rate=0.6, sources=("code",))
    arguments = {"mixture": {"web": 0.5, "code": 0.5}, "schedule": (), "sequence_length": 64}
    plain, turned = loader(mixed, **arguments), loader(mixed, **arguments, fill_in_the_middle=settings)
    marks = [2, 3, 4]
    count = 0
    for _ in range(5):
        ours, theirs = turned.next_batch(), plain.next_batch()
        for mine, row in zip(ours["labels"].tolist(), theirs["labels"].tolist(), strict=True):
            if any(token >= 1000 for token in row):
                count += sum(token == marks[2] for token in mine)
                lost = [token for token in row if token not in mine and token != END]
                assert all(mine.count(mark) == mine.count(marks[0]) or mine[-1] != END for mark in marks)
                assert len(lost) <= 3 * mine.count(marks[0])
            else:
                assert mine == row
    assert count > 10
    again = loader(mixed, **arguments, fill_in_the_middle=settings)
    assert torch.equal(
        again.next_batch()["tokens"], loader(mixed, **arguments, fill_in_the_middle=settings).next_batch()["tokens"]
    )
    with pytest.raises(UserError, match="fill_in_the_middle"):
        again.load_state_dict(plain.state_dict())


@given(length=st.integers(3, 40), seed=st.integers(0, 1000), room=st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_a_turned_document_is_put_together_again(store: Store, length: int, seed: int, room: int) -> None:
    turn = FillInTheMiddle(store, FillInTheMiddleConfig(rate=1.0), seed=seed)
    ids = np.zeros(length + 2 + room, dtype=np.uint16)
    ids[1 : length + 1] = np.arange(100, 100 + length)
    before = ids.copy()
    labels = turn.apply(ids, length + 1, sample=seed)
    assert labels == min(length + 4, length + 1 + room)
    if room < 3:
        return
    body = ids[1:labels].tolist()
    prefix, suffix, middle = (body.index(mark) for mark in (2, 3, 4))
    if prefix + 1 == suffix and body[0] == 2:
        parts = [[], body[suffix + 1 : middle], body[middle + 1 :]]
        joined = sorted(parts[1] + parts[2])
    else:
        joined = body[prefix + 1 : suffix] + body[middle + 1 :] + body[suffix + 1 : middle]
    assert sorted(joined) == before[1 : length + 1].tolist()
    assert ids[0] == END
    assert ids[labels] == END


def growing(path: Path, shards: int) -> Store:
    """A store whose shards were sealed one by one, and that has not ended."""
    writer = StoreWriter(path, tokenizer=small_tokenizer(), configuration="test")
    for number in range(len(writer.shards), shards):
        documents = distinct_documents([13, 20, 8], 100 + 50 * number)
        writer.add_shard("web", "training", tokenized(documents, f"d{number}"), window=True)
    return Store.open(path, follow=True)


@pytest.mark.parametrize("packing", list(Packing))
def test_what_is_sealed_later_changes_nothing_that_was_decided(tmp_path: Path, packing: Packing) -> None:
    final = growing(tmp_path / "final", 6)
    StoreWriter(final.path, tokenizer=small_tokenizer(), configuration="test").finish()
    expected = loader(Store.open(final.path), schedule=(), mixture={"web": 1}, packing=packing, global_batch_size=1)
    batches = [expected.next_batch() for _ in range(40)]
    state: dict[str, Any] = {}
    taken = 0
    for shards in range(1, 7):
        store = growing(tmp_path / "growing", shards)
        own = loader(store, schedule=(), mixture={"web": 1}, packing=packing, global_batch_size=1)
        if state:
            own.load_state_dict(state)
        while own._behind(np.array([0]), np.array([own.position])) is None:
            assert torch.equal(own.next_batch()["tokens"], batches[taken]["tokens"])
            taken += 1
        with pytest.raises(UserError, match=r"web is used up: set data\.follow=true"):
            own.next_batch()
        state = own.state_dict()
    assert taken >= 13
    own = loader(Store.open(final.path), schedule=(), mixture={"web": 1}, packing=packing, global_batch_size=1)
    own.load_state_dict(state)
    assert torch.equal(own.next_batch()["tokens"], batches[taken]["tokens"])
