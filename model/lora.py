"""LoRA: what a frozen matrix computes, and the little that is learnt beside it (Hu et al., 2021, arXiv:2106.09685).

    y = W x + alpha / rank x B A x          A [rank, inputs] random, B [outputs, rank] zero at first

The idea: an adapter hangs on megatron-core's linear layer as a module of its own, called after the layer's own forward
pass; the layer keeps its parameters, their names and its collectives, so that any checkpoint of the model is a starting
point. Adapters are those of `peft`: one for each projection, though queries, keys and values share a matrix here.

Layouts: of a column-parallel matrix B is cut as the matrix is and every tensor rank holds A; of a row-parallel one A is
cut and every rank holds B. What A gives is what ranks exchange, [tokens, batch, rank] numbers beside the layer's
[tokens, batch, hidden] ones: the price is one more small message a matrix, the gain that no rank computes B A x for
tokens or channels that are not its own. Under sequence parallelism the factor that all ranks hold sees other tokens on
each, so it is read through an operation whose backward sums over the tensor ranks, as the norms are.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import xxhash
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear

from model.config import LoraConfig, ModelConfig
from model.dropout import drop
from model.families import begins_anew
from model.layer_context import LayerContext
from model.projections import ROW_PARALLEL, A, B, Fused, Projection, adapted, projections, scale
from model.specs import Block
from parallel.topology import Topology


class Adapter(torch.nn.Module):
    """B A x of one projection; x and what comes back are cut over the tensor ranks as the matrix's own are."""

    tokens: LayerContext
    """Handed over by the block before each forward pass."""
    stream = 0
    """Of dropout: a number of this adapter's own."""

    def __init__(
        self, projection: Projection, lora: LoraConfig, *, is_row: bool, like: Tensor, topology: Topology
    ) -> None:
        """`is_row`: of a row-parallel matrix. `like`: its weight, for dtype and device."""
        super().__init__()
        assert lora.rank is not None
        self.dropout = lora.dropout
        self.is_row = is_row
        self.partial = topology.sequence_parallel
        self.groups: ProcessGroupCollection = topology.groups
        ranks = topology.config.tensor
        inputs, outputs = projection.inputs // (ranks if is_row else 1), projection.outputs // (1 if is_row else ranks)
        self.lora_A = torch.nn.Parameter(like.new_empty(lora.rank, inputs))
        self.lora_B = torch.nn.Parameter(like.new_empty(outputs, lora.rank))
        self.cut = {A: 1} if is_row else {B: 0}
        for name, dimension in self.cut.items():
            set_tensor_model_parallel_attributes(getattr(self, name), is_parallel=True, dim=dimension, stride=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[tokens, batch, inputs] -> [tokens, batch, outputs]."""
        if self.training and self.dropout:
            hidden = self._dropped(hidden)
        if self.groups.tp.size() == 1:
            return linear(linear(hidden, self.lora_A), self.lora_B)
        if self.is_row:
            return linear(self._summed(linear(hidden, self.lora_A)), self._read(self.lora_B))
        return linear(self._spread(linear(hidden, self._read(self.lora_A))), self.lora_B)

    def _dropped(self, hidden: Tensor) -> Tensor:
        """A row-parallel matrix reads some channels of all tokens, the others all channels of some tokens."""
        keys = self.tokens.all_dropout_keys if self.is_row else self.tokens.dropout_keys
        assert keys is not None
        first = self.groups.tp.rank() * hidden.shape[-1] if self.is_row else 0
        return drop(hidden, keys, stream=self.stream, share=self.dropout, first=first)

    def _read(self, whole: Tensor) -> Tensor:
        """A factor that every tensor rank holds."""
        return copy_to_tensor_model_parallel_region(whole, group=self.groups.tp) if self.partial else whole

    def _spread(self, low: Tensor) -> Tensor:
        """What A gives of all tokens, to be multiplied by each rank's part of B."""
        if self.partial:
            return gather_from_sequence_parallel_region(low, group=self.groups.tp)
        return copy_to_tensor_model_parallel_region(low, group=self.groups.tp)

    def _summed(self, low: Tensor) -> Tensor:
        """The sum of what the ranks' parts of A give, of the tokens that the matrix's output has."""
        if self.partial:
            return reduce_scatter_to_sequence_parallel_region(low, group=self.groups.tp)
        return reduce_from_tensor_model_parallel_region(low, group=self.groups.tp)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Both factors, one of them a shard."""
        del metadata
        state = {A: self.lora_A, B: self.lora_B}
        tp, dp_cp = self.groups.tp, self.groups.dp_cp
        return make_sharded_tensors_for_checkpoint(
            state, prefix, self.cut, sharded_offsets, tp_group=tp, dp_cp_group=dp_cp
        )


def adapt(chunk: torch.nn.Module, config: ModelConfig, topology: Topology) -> None:
    """Hangs the adapters on a chunk's matrices, and freezes all that does not begin anew with them."""
    linears = [
        (path.rpartition(".")[2], module)
        for path, module in chunk.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    ]
    for name, module in linears:
        if adapted(config, name):
            _hang(module, name, config, topology)
    for block in (module for module in chunk.modules() if isinstance(module, Block)):
        for path, module in block.named_modules():
            if isinstance(module, Adapter):
                module.stream = xxhash.xxh3_64_intdigest(f"{block.layer_number}.{path}".encode())
                block.told.append(module)
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(begins_anew(config, name))


def _hang(module: Any, name: str, config: ModelConfig, topology: Topology) -> None:
    found, row = projections(config, name), name in ROW_PARALLEL
    assert found is not None
    for part in adapted(config, name):
        adapter = Adapter(part, config.lora, is_row=row, like=module.weight, topology=topology)
        module.add_module(part.name, adapter)
    module.sharded_state_dict = partial(_described, module, module.sharded_state_dict)
    turns = max(1, found.turns // topology.config.tensor)
    module.register_forward_hook(partial(_added, found=replace(found, turns=turns), factor=scale(config)))


def _added(
    module: Any, arguments: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor | None], *, found: Fused, factor: float
) -> tuple[Tensor, Tensor | None]:
    """What the layer gives, with what its adapters add."""
    output, bias = outputs
    adapters = [getattr(module, part.name, None) for part in found.parts]
    changes = [None if adapter is None else adapter(arguments[0]) for adapter in adapters]
    return output + factor * in_turns(changes, found, output.shape[-1]), bias


def in_turns(changes: Sequence[Tensor | None], found: Fused, width: int) -> Tensor:
    """[..., outputs] of each projection, zeros where it has no adapter -> [..., width], as the matrix's rows stand."""
    if len(changes) == 1 and changes[0] is not None:
        return changes[0]
    given = next(change for change in changes if change is not None)
    share = width / sum(part.outputs for part in found.parts)
    parts = [
        given.new_zeros(*given.shape[:-1], round(part.outputs * share)) if change is None else change
        for part, change in zip(found.parts, changes, strict=True)
    ]
    return torch.cat([part.unflatten(-1, (found.turns, -1)) for part in parts], dim=-1).flatten(-2)


def _described(
    module: Any, own: Callable[..., dict[str, Any]], prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
) -> dict[str, Any]:
    """megatron-core's description of a matrix, in which all but the matrix is whole on each rank, and its adapters'."""
    found = own(prefix=prefix, sharded_offsets=sharded_offsets, metadata=metadata)
    for name, child in module.named_children():
        found |= child.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata)
    return found


def change(config: ModelConfig, weight: str, read: Callable[[str], Tensor]) -> Tensor | None:
    """What the adapters add to a whole matrix [outputs, inputs]; None where it has none.

    Args:
        weight: the matrix's global name.
        read: a whole tensor by its global name.
    """
    path, _, kind = weight.rpartition(".")
    name = path.rpartition(".")[2]
    having, found = adapted(config, name), projections(config, name)
    if kind != "weight" or not having:
        return None
    assert found is not None
    changes = [
        scale(config) * (read(f"{path}.{part.name}.{B}").float() @ read(f"{path}.{part.name}.{A}").float()).T
        if part in having
        else None
        for part in found.parts
    ]
    return in_turns(changes, found, sum(part.outputs for part in found.parts)).T


def without(config: ModelConfig) -> ModelConfig:
    """A model without adapters that computes the same, with matrices to which their `change` was added."""
    return replace(config, lora=LoraConfig())
