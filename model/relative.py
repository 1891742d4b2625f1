"""Positions told by distance: what a query adds to the score of a key is looked up by how far apart they stand.

Source: Raffel et al., 2019, arXiv:1910.10683, section 2.1. Distances fall into buckets, one each where they are small,
logarithmically wider ones up to a largest distance. The table has a column for each head, cut over the tensor ranks as
heads are. The bias of a document's queries is made anew in each layer: it costs a look-up, and no gradient has to be
kept over layers that recompute.
"""

import math
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from model.config import ModelConfig
from parallel.topology import Topology


def buckets(distances: Tensor, *, count: int, largest: int, both_sides: bool) -> Tensor:
    """The bucket of each distance, key minus query, int64; with `both_sides` half of them are for keys that follow."""
    found = torch.zeros_like(distances)
    if both_sides:
        count //= 2
        found += (distances > 0) * count
        distances = distances.abs()
    else:
        distances = (-distances).clamp(min=0)
    exact = count // 2
    # In float32, as everyone who trained such a table computed it: the widths are a part of its meaning.
    wide = exact + ((distances.float() / exact).log() / math.log(largest / exact) * (count - exact)).long()
    return found + torch.where(distances < exact, distances, wide.clamp(max=count - 1))


class RelativeBias(MegatronModule):
    """The table of one stack, shared by all its layers."""

    def __init__(
        self, layer_config: TransformerConfig, config: ModelConfig, topology: Topology, *, both_sides: bool
    ) -> None:
        super().__init__(layer_config)
        shape = (config.relative_buckets, config.heads // topology.config.tensor)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=layer_config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 1  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]
        self.tp_group = topology.groups.tp
        self._dp_cp = topology.groups.dp_cp
        self._largest = config.relative_distance
        self._both_sides = both_sides

    def forward(self, start: int, length: int, keys: int) -> Tensor:
        """For queries `start` to start + length - 1 of a document and its first `keys` keys, [heads, length, keys]."""
        device = self.weight.device
        places = torch.arange(keys, device=device) - torch.arange(start, start + length, device=device)[:, None]
        chosen = buckets(places, count=len(self.weight), largest=self._largest, both_sides=self._both_sides)
        return self.weight[chosen].permute(2, 0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {"weight": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=self._dp_cp,
        )
