"""A rank's parameters and what each is a part of.

megatron-core describes a parameter by the global tensor that it is a shard of: global name, global shape, offset. This
module reads that description once, before ZeRO flattens or partitions anything, and keeps it beside the parameter. It
serves initial values, checkpoints and the comparison of gradients, so that all three mean the same thing by a name.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from parallel.config import OptimizerConfig
from parallel.rules import Setting, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A contiguous piece of a local parameter that is a rectangle of one global tensor."""

    description: ShardedTensor
    """Global name (`key`), shape, offset and replica number; without data."""
    start: int
    """First element of the piece in the flattened local parameter."""

    def of(self, local: Tensor) -> Tensor:
        """The piece of a tensor that has the whole local parameter's shape; a view."""
        return (
            local.flatten()
            .narrow(0, self.start, math.prod(self.description.local_shape))
            .view(self.description.local_shape)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalParameter:
    """One parameter as this rank holds it."""

    parameter: torch.nn.Parameter
    shape: torch.Size
    """Local shape, kept because ZeRO-3 empties the parameter."""
    shards: tuple[Shard, ...]
    expert: bool
    """Whether it is a part of some experts, which not every data-parallel rank holds."""
    cut_over_tensor_ranks: bool
    """Whether each tensor rank holds another part; otherwise all of them hold the same values."""
    tied_copy: bool
    """Whether this is the last pipeline stage's copy of a tied embedding, which counts once in a norm."""
    tied: bool
    """Whether first and last pipeline stage hold copies of it, whose gradients are to be added."""
    learning_rate_factor: float = 1.0
    """What the model asks its learning rate to be multiplied by."""
    frozen: bool = False
    """Whether the model asks that it be not trained."""

    @property
    def name(self) -> str:
        """The global name; the experts of a layer share one."""
        return self.shards[0].description.key if self.shards else ""

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns."""
        return len(self.shape) > 1

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape before tensor ranks cut it; of an expert, of that one."""
        described = self.shards[0].description
        return tuple(described.global_shape[described.prepend_axis_num :])


@dataclass(frozen=True, kw_only=True, slots=True)
class Fragment:
    """A run of elements of a flattened local parameter that this rank holds."""

    start: int
    """First element."""
    value: Tensor
    """[elements], the memory of whoever holds them."""

    @property
    def stop(self) -> int:
        """One more than the last element."""
        return self.start + self.value.numel()


def setting_of(local: LocalParameter, config: OptimizerConfig) -> Setting:
    """What the rules of the optimizer, and the model's own wish, make of a parameter."""
    return setting(local.name, is_matrix=local.is_matrix, config=config, factor=local.learning_rate_factor)


def _pieces(chunk: torch.nn.Module) -> Iterator[ShardedTensor]:
    state = cast(MegatronModule, chunk).sharded_state_dict()
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and value.data is not None:
            yield value


def local_parameters(chunks: Sequence[torch.nn.Module], *, last_stage_of_several: bool) -> list[LocalParameter]:
    """Every parameter of a rank's chunks, in the order of the modules."""
    by_storage: dict[int, list[ShardedTensor]] = {}
    for chunk in chunks:
        for piece in _pieces(chunk):
            assert piece.data is not None
            by_storage.setdefault(piece.data.untyped_storage()._cdata, []).append(piece)
    found: list[LocalParameter] = []
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            pieces = by_storage.get(parameter.untyped_storage()._cdata)
            assert pieces, f"{name} has no sharded description"
            shards = tuple(
                Shard(
                    description=replace(piece, data=None, local_shape=tuple(piece.local_shape)),
                    start=int(cast(Tensor, piece.data).storage_offset() - parameter.storage_offset()),
                )
                for piece in pieces
            )
            tied = bool(getattr(parameter, "shared_embedding", False))
            found.append(
                LocalParameter(
                    parameter=parameter,
                    shape=parameter.shape,
                    shards=shards,
                    expert=not getattr(parameter, "allreduce", True),
                    cut_over_tensor_ranks=bool(getattr(parameter, "tensor_model_parallel", False)),
                    tied_copy=tied and last_stage_of_several,
                    tied=tied,
                    learning_rate_factor=getattr(parameter, "learning_rate_factor", 1.0),
                    frozen=not parameter.requires_grad,
                )
            )
    return found
