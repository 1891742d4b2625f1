"""Comparing two layouts parameter by parameter (INTERFACES, "Comparing layouts").

`whole` puts the ranks' shards together under global names; what several ranks hold copies of must be the same on all of
them, to the last bit, and is remembered where it is not. The error of a tensor is relative to its own norm, or to a
millionth of the norm of them all where that is larger: some gradients are zero by mathematics (a key's bias).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from launcher.verify.measure import Shards

_FLOOR = 1e-6
"""Share of the global norm below which a tensor counts as zero by mathematics."""

_TINY = float(np.finfo(float).tiny)

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Whole:
    """Global tensors by global name."""

    tensors: Tensors
    copies: dict[str, list[tuple[int, np.ndarray]]] = field(default_factory=dict)
    """Of tensors whose copies differ: each rank that holds a part, and its view of the whole, NaN where it has none."""

    def spreads(self) -> dict[str, float]:
        """How far the copies of a tensor lie apart, relative to its norm; only of those that differ."""
        found = {}
        for name, views in self.copies.items():
            stacked = np.stack([view for _, view in views])
            apart = np.linalg.norm(np.nan_to_num(np.fmax.reduce(stacked) - np.fmin.reduce(stacked)))
            found[name] = float(apart / max(np.linalg.norm(self.tensors[name]), _TINY)) or math.inf
        return {name: spread if math.isfinite(spread) else math.inf for name, spread in found.items()}


def whole(per_rank: Sequence[Shards]) -> Whole:
    """Global tensors from every rank's shards, in float64; of differing copies the last one counts."""
    tensors: Tensors = {}
    seen: Tensors = {}
    differ: set[str] = set()
    for shards in per_rank:
        for described, value in shards:
            name, place = described.key, described.global_slice()
            target = tensors.setdefault(name, np.zeros(described.global_shape))
            before = seen.setdefault(name, np.zeros(described.global_shape, dtype=bool))[place]
            value = value.reshape(before.shape)
            if before.any() and not np.array_equal(target[place], value, equal_nan=True):
                differ.add(name)
            target[place] = value
            before[...] = True
    missing = [name for name, parts in seen.items() if not parts.all()]
    assert not missing, f"no rank holds a part of {missing}"
    copies = {name: [(rank, _view(name, shards)) for rank, shards in _holders(name, per_rank)] for name in differ}
    return Whole(tensors=tensors, copies=copies)


def _holders(name: str, per_rank: Sequence[Shards]) -> list[tuple[int, Shards]]:
    return [(rank, shards) for rank, shards in enumerate(per_rank) if any(found.key == name for found, _ in shards)]


def _view(name: str, shards: Shards) -> np.ndarray:
    held = [(described, value) for described, value in shards if described.key == name]
    view = np.full(held[0][0].global_shape, np.nan)
    for described, value in held:
        view[described.global_slice()] = value.reshape(view[described.global_slice()].shape)
    return view


def errors(ours: Tensors, reference: Tensors) -> dict[str, float]:
    """The relative error of each tensor, infinite where one is not a number; both sides hold the same names."""
    assert ours.keys() == reference.keys(), ours.keys() ^ reference.keys()
    floor = max(_FLOOR * norm(reference), _TINY)
    found = {
        name: float(np.linalg.norm(ours[name] - tensor) / max(np.linalg.norm(tensor), floor))
        for name, tensor in reference.items()
    }
    return {name: error if math.isfinite(error) else math.inf for name, error in found.items()}


def worst(ours: Tensors, reference: Tensors) -> tuple[float, str]:
    """The largest relative error, and whose it is."""
    return max((error, name) for name, error in errors(ours, reference).items())


def norm(tensors: Mapping[str, np.ndarray]) -> float:
    """The norm of all tensors together."""
    return float(np.sqrt(sum(float((tensor**2).sum()) for tensor in tensors.values())))


def relative(ours: float, reference: float) -> float:
    """The relative error of a number, infinite where one is not a number."""
    error = abs(ours - reference) / max(abs(reference), _TINY)
    return error if math.isfinite(error) else math.inf
