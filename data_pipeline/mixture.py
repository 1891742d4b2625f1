"""Which source stands at which position of the training order, and every other shuffled order of the loader.

Idea: the order is computed, not drawn. Weights are rounded once to whole quotas of a block of 65,536 positions, and
block k of the order is a pure function of (seed, quotas, k): occurrence i of a source with quota q gets the key
(i + u) / q, with one phase u for each (seed, block, source), and positions follow from sorting the keys. So every
source is spread evenly (any stretch of the order holds its share, give or take a few), how often it stood before any
position is a formula, and a loader can begin anywhere at once.

Randomness is counter-based: Philox keyed by the hash of a purpose and some integers. Nothing depends on what was
drawn before, nor on how a version of numpy turns bits into permutations: only raw bits are used.
"""

import json
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import xxhash
from numpy.typing import NDArray

from parallel.common.errors import ConfigError, Problem

BLOCK = 65_536
"""Positions after which the quotas come out even; a weight is rounded to a multiple of 1 / BLOCK."""


def random_bits(count: int, *purpose: str | int) -> NDArray[np.uint64]:
    """`count` random 64-bit words that depend on `purpose` alone."""
    key = xxhash.xxh3_128_intdigest(json.dumps(purpose, ensure_ascii=False).encode())
    return np.random.Philox(key=key).random_raw(count)


def permutation(count: int, *purpose: str | int) -> NDArray[np.uint64]:
    """0 to count - 1 in a random order that depends on `purpose` alone.

    Each number is sorted behind random high bits in one word, so no two keys are equal and every sorting algorithm
    gives the same order.
    """
    low_bits = np.uint64(max(count - 1, 0).bit_length())
    keys = random_bits(count, *purpose)
    keys >>= low_bits
    keys <<= low_bits
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    keys &= (np.uint64(1) << low_bits) - np.uint64(1)
    return keys


def quotas(weights: Mapping[str, float]) -> dict[str, int]:
    """Rounds weights to positions of a block, by largest remainder; sources of weight 0 are left out.

    Every other source gets at least one position. The result does not depend on the mapping's order.

    Raises:
        ConfigError: a weight is negative or not finite, all are 0, or there are more sources than positions.
    """
    problems = [
        Problem(key=f"data.mixture.{name}", got=weight, legal="a number that is 0 or greater")
        for name, weight in weights.items()
        if not math.isfinite(weight) or weight < 0
    ]
    if problems:
        raise ConfigError(problems)
    exact = {name: Fraction(weight) for name, weight in sorted(weights.items()) if weight > 0}
    if not 0 < len(exact) <= BLOCK:
        raise ConfigError([Problem(key="data.mixture", got=dict(weights), legal=f"1 to {BLOCK} weights above 0")])
    total = sum(exact.values())
    shares = {name: weight / total * BLOCK for name, weight in exact.items()}
    whole = {name: max(1, math.floor(share)) for name, share in shares.items()}
    missing = BLOCK - sum(whole.values())
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        # Each move goes where it brings a quota closest to its share, never below one position.
        name = max((name for name in whole if whole[name] + step), key=lambda name: step * (shares[name] - whole[name]))
        whole[name] += step
    return whole


def spread(counts: NDArray[np.int64], phases: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An order in which kind s appears `counts[s]` times, evenly.

    Args:
        counts: Occurrences of each kind, [kinds].
        phases: Where in its first interval a kind appears first, from 0 to 1, [kinds].

    Returns:
        For each place of the order the kind, and which of its occurrences (0, 1, ...) it is; both [sum of counts].
    """
    kinds = np.repeat(np.arange(len(counts)), counts)
    occurrences = np.arange(len(kinds)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.argsort((occurrences + phases[kinds]) / counts[kinds], kind="stable")
    return kinds[order], occurrences[order]


class Mixture:
    """The order of sources: position -> (source, n-th sample of that source)."""

    def __init__(self, weights: Mapping[str, float], *, seed: int) -> None:
        """See `quotas` for the weights and what it raises."""
        self.quotas = quotas(weights)
        """Positions of each source in a block, by name."""
        self.sources = tuple(self.quotas)
        """Names in alphabetical order; `locate` and `counts` speak of indices into it."""
        self._seed = seed
        self._counts = np.array(list(self.quotas.values()), dtype=np.int64)
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For positions in the order: index of the source, and how many of its samples stand before; both [n]."""
        blocks, places = np.divmod(positions, BLOCK)
        sources = np.empty_like(positions)
        ordinals = np.empty_like(positions)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            kinds, occurrences = self._block(block)
            sources[here] = kinds[places[here]]
            ordinals[here] = block * self._counts[sources[here]] + occurrences[places[here]]
        return sources, ordinals

    def counts(self, position: int) -> NDArray[np.int64]:
        """Samples of each source before a position, [sources]."""
        block, place = divmod(position, BLOCK)
        if not place:
            return block * self._counts
        kinds, _ = self._block(block)
        return block * self._counts + np.bincount(kinds[:place], minlength=len(self.sources))

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and occurrence at each place of a block, [BLOCK]; the last two blocks are kept (1 MiB each)."""
        if block not in self._blocks:
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            words = [random_bits(1, "phase", self._seed, block, name)[0] for name in self.sources]
            phases = (np.array(words, dtype=np.uint64) >> np.uint64(11)) * 2.0**-53
            self._blocks[block] = spread(self._counts, phases)
        return self._blocks[block]
