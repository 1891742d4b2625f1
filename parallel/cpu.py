"""megatron-core without a GPU: maps what it asks of CUDA by name to the CPU.

megatron-core runs under gloo once a handful of calls that name CUDA are answered: the current device, the state of the
device's random numbers, synchronisation, `device="cuda"` in the pipeline schedules, the copy of split sizes to the
host in the all-to-all dispatcher of experts; and once gathers of unequal parts, which gloo lacks, are made of equal
ones. This module answers them, once a process, and only where there is no GPU;
with a GPU it does nothing, so that the code path is the same on both.

The trade-off: attributes of third-party modules are replaced. The list is short, stands here alone, and the versions
that it was made for are pinned exactly.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.distributed import ProcessGroup

_CPU = torch.device("cpu")
_gather, _scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim


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


def _splits_to_host(
    dispatcher: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor | None:
    """What the dispatcher does on a stream of its own: the sizes of its messages become arrays of the host."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            sizes = getattr(dispatcher, name)
            if isinstance(sizes, torch.Tensor):
                setattr(dispatcher, name, sizes.numpy())
    return tokens_per_expert


def _gather_unequal(
    part: torch.Tensor,
    group: ProcessGroup,
    output_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Gathers along the first dimension, so many rows from each rank, by parts padded to the longest."""
    if output_split_sizes is None or group.size() == 1:
        return _gather(part, group, None, use_global_buffer)
    longest = max(output_split_sizes)
    padded = torch.cat((part, part.new_zeros(longest - len(part), *part.shape[1:])))
    gathered = _gather(padded, group).split(longest)
    return torch.cat([rows[:size] for rows, size in zip(gathered, output_split_sizes, strict=True)])


def _scatter_unequal(
    whole: torch.Tensor,
    group: ProcessGroup,
    input_split_sizes: Sequence[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """Sums over the ranks and leaves each rank its rows, by a sum of everything."""
    if input_split_sizes is None or group.size() == 1:
        return _scatter(whole, group, None, use_global_buffer)
    total = whole.clone()
    dist.all_reduce(total, group=group)
    return total.split(list(input_split_sizes))[group.rank()].clone()


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
    dispatcher: Any = MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = _CPU  # else it would make a stream, which the replacement has no use for
    dispatcher._maybe_dtoh_and_synchronize = _splits_to_host
    mappings._gather_along_first_dim = _gather_unequal
    mappings._reduce_scatter_along_first_dim = _scatter_unequal
