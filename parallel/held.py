"""Bytes that this rank really holds, counted over the storages of live tensors, not derived from a configuration.

Two tensors that share a storage count once, under the first name: an fp32 weight that is its own master is a weight.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from parallel.memory import HOST, KINDS

Tensors = Mapping[str, Iterable[Tensor | None]]
"""Some of a rank's tensors for each of `KINDS`."""


def storages(tensors: Tensors, device: torch.device) -> dict[str, dict[int, torch.UntypedStorage]]:
    """The distinct storages behind `tensors` by kind and place, by address."""
    found: dict[str, dict[int, torch.UntypedStorage]] = {}
    seen: set[tuple[str, int]] = set()
    for kind in KINDS:
        for tensor in tensors.get(kind, ()):
            storage = None if tensor is None else tensor.untyped_storage()
            if storage is None or (storage.device.type, storage.data_ptr()) in seen:
                continue
            seen.add((storage.device.type, storage.data_ptr()))
            place = kind if storage.device.type == device.type else f"{HOST}{kind}"
            found.setdefault(place, {})[storage.data_ptr()] = storage
    return found


def held(tensors: Tensors, device: torch.device) -> dict[str, int]:
    """Bytes by kind; every kind is there, those of the host where there are any."""
    found = storages(tensors, device)
    return dict.fromkeys(KINDS, 0) | {
        place: sum(storage.nbytes() for storage in behind.values()) for place, behind in found.items()
    }
