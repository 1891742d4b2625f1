"""megatron-core without a GPU: maps what it asks of CUDA by name to the CPU.

megatron-core runs under gloo once a handful of calls that name CUDA are answered: the current device, the state of the
device's random numbers, synchronisation, and `device="cuda"` in the pipeline schedules. This module answers them, once
a process, and only where there is no GPU; with a GPU it does nothing, so that the code path is the same on both.

The trade-off: attributes of third-party modules are replaced. The list is short, stands here alone, and the versions
that it was made for are pinned exactly.
"""

from types import ModuleType
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as tensor_parallel_random

_CPU = torch.device("cpu")


def has_gpu() -> bool:
    """Whether this process sees an accelerator."""
    return torch.cuda.is_available()


class _TorchOnCpu(ModuleType):
    """`torch` as the schedules see it: the same, but `zeros` on the device "cuda" are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.zeros(*size, device=_CPU if device == "cuda" else device, **options)


def _get_random_state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_random_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
    torch.set_rng_state(state)


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for a call that has no meaning on a CPU."""


def _stay(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stands for a move to the device that is the CPU."""
    return tensor


def _current_device() -> torch.device:
    return _CPU


def install() -> None:
    """Makes megatron-core usable on a CPU; does nothing where there is a GPU or where it was done before."""
    if has_gpu() or isinstance(schedules.torch, _TorchOnCpu):
        return
    schedules.torch = _TorchOnCpu("torch")
    torch.cuda.current_device = _current_device
    torch.cuda.synchronize = _nothing
    torch.Tensor.cuda = _stay  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = _get_random_state
    tensor_parallel_random._get_cuda_rng_state = _get_random_state
    tensor_parallel_random._set_cuda_rng_state = _set_random_state
