import json
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.loader import Loader, single_pass
from data_pipeline.mixture import Mixture
from data_pipeline.store import Store
from parallel.common.errors import ConfigError, UserError
from tests.data_pipeline.stores import END, distinct_documents, make_store

TRAINING = {"web": distinct_documents([11, 3, 40, 0, 17, 5], 100), "code": distinct_documents([25, 8], 1000)}
VALIDATION = {"code": distinct_documents([9], 2000), "web": distinct_documents([30, 0, 4], 3000)}
MIXTURE = {"web": 0.6, "code": 0.4}
LENGTH = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("loader") / "store", TRAINING, VALIDATION, shard_tokens=30)


def loader(store: Store, **changes: Any) -> Loader:
    arguments: dict[str, Any] = {
        "mixture": MIXTURE,
        "sequence_length": LENGTH,
        "global_batch_size": 6,
        "micro_batch_size": 1,
        "dp_rank": 0,
        "dp_size": 1,
        "seed": 7,
    }
    return Loader(store, **(arguments | changes))


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def real(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[batch["sample_ids"] >= 0] for name, tensor in batch.items()}


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


def source_of(token: int, documents: Mapping[str, list[list[int]]]) -> str:
    return next(name for name, texts in documents.items() if any(token in text for text in texts))


def test_a_batch_is_what_the_interfaces_say(store: Store) -> None:
    batch = loader(store).next_batch()
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()}
    assert shapes == {
        "tokens": (torch.int64, (6, LENGTH)),
        "labels": (torch.int64, (6, LENGTH)),
        "loss_weights": (torch.float32, (6, LENGTH)),
        "positions": (torch.int64, (6, LENGTH)),
        "document_ids": (torch.int32, (6, LENGTH)),
        "sample_ids": (torch.int64, (6,)),
        "source": (torch.int64, (6,)),
    }
    assert all(tensor.is_contiguous() for tensor in batch.values())
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["sample_ids"].tolist() == list(range(6))
    assert bool((batch["loss_weights"] == 1).all())
    starts = batch["tokens"] == END
    starts[:, 0] = True
    assert torch.equal(batch["positions"] == 0, starts)
    assert torch.equal(batch["document_ids"], (starts.cumsum(1) - 1).int())


def test_documents_are_one_where_they_are_not_masked(store: Store) -> None:
    masked, plain = loader(store).next_batch(), loader(store, mask_documents=False).next_batch()
    assert torch.equal(masked["tokens"], plain["tokens"])
    assert torch.equal(plain["positions"], torch.arange(LENGTH).expand(6, LENGTH))
    assert not plain["document_ids"].any()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_ranks_hold_slices_of_one_global_batch(store: Store, dp_size: int, micro_batch_size: int) -> None:
    whole = loader(store)
    ranks = [loader(store, dp_size=dp_size, dp_rank=rank, micro_batch_size=micro_batch_size) for rank in range(dp_size)]
    rows = -(-6 // (dp_size * micro_batch_size)) * micro_batch_size
    for _ in range(20):
        slices = [rank.next_batch() for rank in ranks]
        assert {len(batch["tokens"]) for batch in slices} == {rows}
        batch = joined(slices)
        empty = batch["sample_ids"] < 0
        assert_equal(real(batch), whole.next_batch())
        assert not empty[:6].any()
        assert not batch["loss_weights"][empty].any()
        assert bool((batch["tokens"][empty] == store.padding).all())
    assert [rank.state_dict() for rank in ranks] == [whole.state_dict()] * dp_size


def test_empty_rows_are_said_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for rank in range(4):
            loader(store, dp_size=4, dp_rank=rank)
    (message,) = caplog.messages
    assert "6 samples" in message
    assert "2 rows of weight zero" in message
    assert "25.0%" in message


def test_resuming_at_any_step_and_size_gives_the_same_batches(store: Store) -> None:
    """More than two epochs of both sources, step by step, at every data-parallel size."""
    steps = 14
    whole = loader(store)
    states, batches = [whole.state_dict()], []
    for _ in range(steps):
        batches.append(whole.next_batch())
        states.append(json.loads(json.dumps(whole.state_dict())))
    assert min(states[-1]["ledger"]["web"] / 82, states[-1]["ledger"]["code"] / 35) > 2
    for dp_size in (1, 2, 4):
        for step in range(steps):
            ranks = [loader(store, dp_size=dp_size, dp_rank=rank) for rank in range(dp_size)]
            for rank in ranks:
                rank.load_state_dict(states[step])
            for later in range(step, min(step + 2, steps)):
                assert_equal(real(joined([rank.next_batch() for rank in ranks])), batches[later])
                assert ranks[-1].state_dict() == states[later + 1]


@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_the_order_does_not_depend_on_batch_sizes(store: Store, sizes: list[int]) -> None:
    reference = loader(store, global_batch_size=sum(sizes)).next_batch()
    state, parts = loader(store).state_dict(), []
    for size in sizes:
        part = loader(store, global_batch_size=size)
        part.load_state_dict(state)
        parts.append(part.next_batch())
        state = part.state_dict()
    assert_equal(joined(parts), reference)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    batch=st.integers(1, 9),
    batches=st.integers(1, 30),
    share=st.floats(0.05, 0.95),
    length=st.sampled_from([5, 16, 50, 200]),
)
def test_the_ledger_and_the_tokens_are_exact(
    store: Store, seed: int, batch: int, batches: int, share: float, length: int
) -> None:
    own = loader(
        store, seed=seed, global_batch_size=batch, sequence_length=length, mixture={"web": share, "code": 1 - share}
    )
    # Rows of a batch come from one source each: an id that is no end tells which; a row of ends alone is told below.
    counts: dict[str, Counter[int]] = {"web": Counter(), "code": Counter()}
    weights = Counter()
    for _ in range(batches):
        rows = own.next_batch()
        columns = (rows[name].tolist() for name in ("labels", "loss_weights", "source"))
        for labels, row_weights, place in zip(*columns, strict=True):
            token = next(token for token in labels if token != END)
            source = source_of(token, TRAINING)
            assert store.sources[place] == source
            counts[source].update(labels)
            weights[source] += int(sum(row_weights))
    assert {name: weights[name] for name in own.ledger} == own.ledger
    for name, documents in TRAINING.items():
        total = sum(len(document) + 1 for document in documents)
        epochs = own.ledger[name] // total
        appearances = [counts[name][token] for document in documents for token in document]
        # Whole epochs are seen wholly; in the one that runs nothing is seen twice, but for a sample across its border.
        assert min(appearances) >= epochs - -(-length // total)
        assert max(appearances) <= epochs + 1 + -(-length // total)


def test_after_whole_epochs_every_token_was_predicted_equally_often(tmp_path: Path) -> None:
    documents = distinct_documents([10, 20, 5, 12, 12])  # 64 tokens with their ends: four samples of 16
    store = make_store(tmp_path, {"web": documents})
    own = loader(store, mixture={}, global_batch_size=4)
    for epoch in range(1, 6):
        labels = Counter(own.next_batch()["labels"].ravel().tolist())
        assert labels == Counter([token for document in documents for token in [*document, END]])
        assert own.ledger == {"web": 64 * epoch}


def at_position(own: Loader, weights: Mapping[str, float], position: int) -> dict[str, Any]:
    """A state far along; loading it asserts that its ledger is what the loader computes."""
    mixture = Mixture(weights, seed=7)
    ledger = dict(zip(mixture.sources, (mixture.counts(position) * LENGTH).tolist(), strict=True))
    return {**own.state_dict(), "position": position, "ledger": ledger}


def test_the_mixture_is_by_tokens_unless_it_is_given(store: Store) -> None:
    by_default = loader(store, mixture={})
    by_default.load_state_dict(at_position(by_default, {"web": 82, "code": 35}, 65_536))
    assert by_default.ledger["code"] / by_default.ledger["web"] == pytest.approx(35 / 82, abs=1e-4)
    only = loader(store, mixture={"code": 5, "web": 0})
    only.next_batch()
    assert only.ledger == {"code": 6 * LENGTH}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"sequence_length": 32}, "sequence_length was 16 and is 32"),
        ({"mixture": {"web": 0.5, "code": 0.5}}, r"data\.mixture changed"),
        ({"mask_documents": False}, "mask_documents was True and is False"),
        ({"split": "validation"}, r"content of data\.store changed, split was training and is validation"),
    ],
)
def test_another_order_is_refused_by_name(store: Store, changes: dict[str, Any], sentence: str) -> None:
    state = loader(store).state_dict()
    with pytest.raises(UserError, match=sentence):
        loader(store, **changes).load_state_dict(state)


def test_changed_data_under_the_same_name_is_refused(store: Store, tmp_path: Path) -> None:
    same = make_store(tmp_path / "same", TRAINING, VALIDATION, shard_tokens=30)
    state = loader(store).state_dict()
    loader(same).load_state_dict(state)
    changed = {**TRAINING, "web": [*TRAINING["web"][:-1], [1, 2, 3, 4, 5]]}
    with pytest.raises(UserError, match=r"the content of data\.store changed"):
        loader(make_store(tmp_path / "changed", changed, VALIDATION, shard_tokens=30)).load_state_dict(state)


def test_a_later_version_is_refused(store: Store) -> None:
    own = loader(store)
    with pytest.raises(UserError, match="version 2: expected 1"):
        own.load_state_dict({**own.state_dict(), "version": 2})


def test_the_state_is_small(tmp_path: Path) -> None:
    names = [f"a source with a long name {index}" for index in range(50)]
    own = loader(make_store(tmp_path, {name: [[70]] for name in names}), mixture={})
    own.load_state_dict(at_position(own, dict.fromkeys(names, 1), 10**12))
    assert len(json.dumps(own.state_dict())) < 4096


def test_a_mixture_of_unknown_sources_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture\.books is 0\.5: expected a source of the store, one of web"):
        loader(store, mixture={"web": 0.5, "books": 0.5})


def test_a_split_without_documents_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"web": [[70]]})
    with pytest.raises(UserError, match="no validation documents"):
        loader(store, split="validation")
    with pytest.raises(UserError, match="no validation documents"):
        next(evaluation(store))


def evaluation(store: Store, **changes: Any) -> Iterator[dict[str, Tensor]]:
    arguments: dict[str, Any] = {
        "sequence_length": LENGTH,
        "global_batch_size": 3,
        "micro_batch_size": 1,
        "dp_rank": 0,
        "dp_size": 1,
    }
    return single_pass(store, "validation", **(arguments | changes))


@pytest.mark.parametrize("length", [1, 5, 16, 500])
def test_a_single_pass_predicts_every_token_once(store: Store, length: int) -> None:
    everything = joined(list(evaluation(store, sequence_length=length)))
    for name, documents in VALIDATION.items():
        rows = real(everything)
        here = rows["source"] == store.sources.index(name)
        labels, weights = rows["labels"][here], rows["loss_weights"][here]
        stream = [token for document in documents for token in [*document, END]]
        assert labels[weights > 0].tolist() == stream
        inputs = [END, *stream[:-1]]
        assert rows["tokens"][here][weights > 0].tolist() == inputs
    assert everything["loss_weights"].sum() == sum(len(text) + 1 for texts in VALIDATION.values() for text in texts)
    empty = everything["sample_ids"] < 0
    assert torch.equal(everything["source"] < 0, empty)
    assert not everything["loss_weights"][empty].any()


@pytest.mark.parametrize("dp_size", [2, 4])
def test_a_single_pass_is_the_same_at_every_size(store: Store, dp_size: int) -> None:
    alone = list(evaluation(store))
    ranks = [list(evaluation(store, dp_rank=rank, dp_size=dp_size)) for rank in range(dp_size)]
    assert {len(batches) for batches in ranks} == {len(alone)}
    for step, batch in enumerate(alone):
        assert_equal(real(joined([rank[step] for rank in ranks])), real(batch))


def test_a_single_pass_begins_with_a_fair_sample(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"web": [[70]]}, {"web": [[70] * 1599], "code": [[71] * 399]})
    first = next(evaluation(store, global_batch_size=25))
    assert Counter(first["source"].tolist()) == {0: 20, 1: 5}


def test_the_loader_imports_without_daft() -> None:
    program = "import sys, data_pipeline.loader; sys.exit('daft' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
