from collections import Counter
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import permutation
from data_pipeline.samples import SourceStream, segments
from tests.data_pipeline.stores import END, distinct_documents, make_store

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=12)
SHARD_TOKENS = st.sampled_from([1, 20, 10_000])


def plain_stream(documents: list[list[int]], epochs: int, seed: int | None) -> list[int]:
    """What `SourceStream` is about, in a loop: documents in each epoch's order, each with its end."""
    stream = []
    for epoch in range(epochs):
        order = range(len(documents))
        if seed is not None:
            order = permutation(len(documents), "documents", seed, "training", "web", 0, epoch).tolist()
        for index in order:
            stream += [*documents[index], END]
    return stream


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, shard_tokens=SHARD_TOKENS, length=st.integers(1, 40), seed=st.none() | st.integers(0, 2**63))
def test_every_token_of_every_epoch_is_predicted_once(
    lengths: list[int], shard_tokens: int, length: int, seed: int | None
) -> None:
    documents = distinct_documents(lengths)
    with TemporaryDirectory() as directory:
        store = make_store(Path(directory), {"web": documents}, shard_tokens=shard_tokens)
        stream = SourceStream(store, "web", split="training", sequence_length=length, seed=seed)
        assert stream.tokens == sum(lengths) + len(lengths)
        ended = 0
        for epoch in range(3):
            # The samples that begin in this epoch: with those of the epochs before, they reach its last token.
            samples = -(-(epoch + 1) * stream.tokens // length)
            expected = plain_stream(documents, epoch + 2 + length // stream.tokens, seed)[: samples * length]
            read = stream.read(np.arange(samples))[0]
            labels = read[:, 1:]
            assert labels.size - (epoch + 1) * stream.tokens < length
            assert Counter(labels.ravel().tolist()) == Counter(expected)
            rows = {(END, *expected[:length])}
            rows |= {tuple(expected[n * length - 1 : (n + 1) * length]) for n in range(1, samples)}
            assert {tuple(row) for row in read.tolist()} == rows
            # Each epoch's samples come before those that begin in a later one.
            labels_before = Counter(read[:ended, 1:].ravel().tolist())
            assert labels_before == Counter(expected[: ended * length])
            ended = samples


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, length=st.integers(1, 40), data=st.data())
def test_a_sample_does_not_depend_on_what_was_read_before(lengths: list[int], length: int, data: st.DataObject) -> None:
    wanted = np.array(data.draw(st.lists(st.integers(0, 200), min_size=1, max_size=20)))
    with TemporaryDirectory() as directory:
        store = make_store(Path(directory), {"web": distinct_documents(lengths)})
        together = SourceStream(store, "web", split="training", sequence_length=length, seed=3).read(wanted)[0]
        used = SourceStream(store, "web", split="training", sequence_length=length, seed=3)
        alone = [used.read(np.array([ordinal]))[0][0] for ordinal in wanted[::-1]][::-1]
    np.testing.assert_array_equal(together, alone)


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"web": distinct_documents([9] * 64), "other": distinct_documents([9] * 64)})

    def order(source: str, seed: int, epoch: int) -> tuple[int, ...]:
        stream = SourceStream(store, source, split="training", sequence_length=10, seed=seed)
        return tuple(stream.read(np.arange(64 * epoch, 64 * (epoch + 1)))[0][:, 1].tolist())

    orders = [order("web", 1, 0), order("web", 1, 1), order("web", 2, 0), order("other", 1, 0)]
    assert len(set(orders)) == 4
    assert len({tuple(sorted(firsts)) for firsts in orders}) == 1


def test_parts_of_a_long_document_do_not_follow_one_another(tmp_path: Path) -> None:
    store = make_store(tmp_path, {"web": distinct_documents([6399])})
    firsts = SourceStream(store, "web", split="training", sequence_length=64, seed=1).read(np.arange(100))[0][:, 1]
    assert (np.diff(firsts.astype(int)) == 64).sum() < 10


def test_segments_as_drawn_in_the_docstring() -> None:
    a, b, c = 1, 2, 3
    inputs = np.array([[END, a, a, END, b, b], [b, END, c, c, c, c]], dtype=np.uint16)
    positions, document_ids = segments(inputs, END)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]]
    assert document_ids.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert (positions.dtype, document_ids.dtype) == (np.int64, np.int32)


@given(st.integers(1, 9), st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_segments_equal_a_plain_loop(length: int, ids: list[int]) -> None:
    inputs = np.resize(np.array(ids, dtype=np.uint16), (-(-len(ids) // length), length))
    positions, document_ids = segments(inputs, END)
    for row in range(len(inputs)):
        position, document = -1, 0
        for column in range(length):
            new = column > 0 and inputs[row, column] == END
            position, document = (0, document + 1) if new else (position + 1, document)
            assert (positions[row, column], document_ids[row, column]) == (position, document)


@pytest.mark.parametrize("length", [1, 7, 100])
def test_a_source_shorter_than_a_sample_goes_round(tmp_path: Path, length: int) -> None:
    store = make_store(tmp_path, {"web": [[70]]})
    read = SourceStream(store, "web", split="training", sequence_length=length, seed=1).read(np.arange(3))[0]
    np.testing.assert_array_equal(np.sort(read[:, 1:].ravel()), np.sort(np.resize([70, END], 3 * length)))
    for row in read.tolist():
        assert all({one, following} == {70, END} for one, following in pairwise(row))
