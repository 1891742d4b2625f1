import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import BLOCK, Mixture, permutation, quotas, random_bits, spread
from parallel.common.errors import ConfigError

WEIGHTS = st.dictionaries(
    st.text(min_size=1, max_size=5), st.floats(min_value=1e-9, max_value=1e9), min_size=1, max_size=12
)


@given(weights=WEIGHTS, idle=st.booleans())
def test_quotas_are_whole_and_closest_to_the_weights(weights: dict[str, float], idle: bool) -> None:
    given_weights = {**weights, "idle source": 0.0} if idle else weights
    found = quotas(given_weights)
    assert found == quotas(dict(reversed(given_weights.items())))
    assert list(found) == sorted(weights)
    assert sum(found.values()) == BLOCK
    total = math.fsum(weights.values())
    for name, quota in found.items():
        assert quota >= 1
        # Sources lifted to one position take from the others, in the worst case all from one.
        assert abs(quota - weights[name] / total * BLOCK) <= len(weights) + 1e-3


def test_quotas_by_hand() -> None:
    assert quotas({"dclm": 0.7, "wanjuan": 0.2, "code": 0.1}) == {"dclm": 45875, "wanjuan": 13107, "code": 6554}
    assert quotas({"a": 3, "b": 1}) == {"a": 49152, "b": 16384}
    assert quotas({"a": 1, "b": 1e-12}) == {"a": 65535, "b": 1}


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"a": 1.0, "b": -1.0}, r"data\.mixture\.b is -1\.0: expected a number that is 0 or greater"),
        ({"a": math.nan}, r"data\.mixture\.a is nan"),
        ({"a": math.inf}, r"data\.mixture\.a is inf"),
        ({"a": 0.0}, r"data\.mixture is \{'a': 0\.0\}: expected 1 to 65536 weights above 0"),
        ({}, r"data\.mixture is \{\}"),
    ],
)
def test_senseless_weights_are_refused(weights: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        quotas(weights)


@settings(max_examples=20, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**63), block=st.integers(0, 1000))
def test_a_block_holds_the_quotas_and_counts_are_what_went_before(
    weights: dict[str, float], seed: int, block: int
) -> None:
    mixture = Mixture(weights, seed=seed)
    positions = np.arange(block * BLOCK, (block + 1) * BLOCK)
    sources, ordinals = mixture.locate(positions)
    for index, name in enumerate(mixture.sources):
        quota = mixture.quotas[name]
        np.testing.assert_array_equal(ordinals[sources == index], np.arange(block * quota, (block + 1) * quota))
    for place in (0, 1, 77, 40_000, BLOCK - 1):
        expected = block * np.array(list(mixture.quotas.values()))
        expected += np.bincount(sources[:place], minlength=len(mixture.sources))
        np.testing.assert_array_equal(mixture.counts(block * BLOCK + place), expected)


@settings(max_examples=10, deadline=None)
@given(weights=WEIGHTS, seed=st.integers(0, 2**63))
def test_sources_are_spread_evenly(weights: dict[str, float], seed: int) -> None:
    mixture = Mixture(weights, seed=seed)
    sources, _ = mixture.locate(np.arange(BLOCK))
    for index, name in enumerate(mixture.sources):
        share = mixture.quotas[name] / BLOCK
        before = np.cumsum(sources == index)
        # Its own rounding, and its share of everybody's.
        assert np.abs(before - share * np.arange(1, BLOCK + 1)).max() <= 2 + share * len(weights)


@given(seed=st.integers(0, 2**63), start=st.integers(0, 2 * BLOCK), length=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_the_order_does_not_depend_on_what_was_asked_before(seed: int, start: int, length: int) -> None:
    fresh = Mixture({"a": 2, "b": 1, "c": 0.1}, seed=seed)
    used = Mixture({"c": 0.1, "b": 1, "a": 2}, seed=seed)
    used.locate(np.array([5 * BLOCK, 0, 3 * BLOCK]))
    used.counts(7 * BLOCK + 1)
    positions = np.arange(start, start + length)
    for ours, theirs in zip(fresh.locate(positions), used.locate(positions), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_seeds_and_blocks_differ() -> None:
    order = Mixture({"a": 1, "b": 1, "c": 1}, seed=1).locate(np.arange(2 * BLOCK))[0]
    other = Mixture({"a": 1, "b": 1, "c": 1}, seed=2).locate(np.arange(BLOCK))[0]
    assert (order[:BLOCK] != order[BLOCK:]).any()
    assert (order[:BLOCK] != other).any()


@given(st.integers(0, 3000), st.integers(0, 2**63))
def test_a_permutation_holds_everything_once(count: int, seed: int) -> None:
    order = permutation(count, "test", seed)
    np.testing.assert_array_equal(np.sort(order), np.arange(count))
    np.testing.assert_array_equal(order, permutation(count, "test", seed))


def test_random_orders_stay_what_they_are() -> None:
    """Checkpoints of older versions point into these orders: they may never change."""
    assert random_bits(2, "documents", 1, "web", 0).tolist() == [3263169829347274992, 1711794193799519635]
    assert permutation(8, "documents", 1, "web", 0).tolist() == [1, 2, 0, 4, 5, 7, 3, 6]


def test_permutations_are_uniform() -> None:
    orders = np.array([permutation(5, "uniform", seed) for seed in range(6000)])
    for place in range(5):
        shares = np.bincount(orders[:, place].astype(np.int64), minlength=5) / len(orders)
        np.testing.assert_allclose(shares, 0.2, atol=0.025)


def test_spread_is_even_and_ties_follow_the_listing() -> None:
    kinds, occurrences = spread(np.array([2, 4]), np.array([0.5, 0.5]))
    assert kinds.tolist() == [1, 0, 1, 1, 0, 1]
    assert occurrences.tolist() == [0, 0, 1, 2, 1, 3]
