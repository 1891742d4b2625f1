"""What stands on an encoder: the two heads of BERT, right under tensor and sequence parallelism.

Under sequence parallelism each tensor rank sees its own part of the sequence, so a weight that all ranks hold is read
through an operation whose backward sums over them; what only one rank has (the first token of a row) is handed to all
by a sum.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import embedding, gelu, linear

from model.norms import norm
from parallel.topology import Topology


class Dense(torch.nn.Module):
    """A matrix and a bias that every tensor rank holds whole."""

    def __init__(
        self, config: TransformerConfig, inputs: int, outputs: int, *, partial: bool, bias: bool = True
    ) -> None:
        """`partial`: each tensor rank sees other tokens, so the gradients are to be summed over them."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(outputs, dtype=config.params_dtype)) if bias else None
        self.partial = partial

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        weight, bias = self.weight, self.bias
        if self.partial:
            weight = copy_to_tensor_model_parallel_region(weight)
            bias = None if bias is None else copy_to_tensor_model_parallel_region(bias)
        return linear(hidden, weight, bias)


class SegmentEmbedding(torch.nn.Module):
    """What the first and the second segment of a pair add to the embeddings of their tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(2, config.hidden_size, dtype=config.params_dtype))
        self.partial = config.sequence_parallel

    def forward(self, segment_ids: Tensor) -> Tensor:
        """[own, batch] of 0 and 1 -> [own, batch, hidden]."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.partial else self.weight
        return embedding(segment_ids, weight)


class MaskedHead(torch.nn.Module):
    """The layer between the last block and the output layer (Devlin et al., 2018, arXiv:1810.04805)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = Dense(config, config.hidden_size, config.hidden_size, partial=config.sequence_parallel)
        self.norm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> the same shape."""
        return self.norm(gelu(self.dense(hidden)))


class OutputBias(MegatronModule):
    """A bias of each token of the vocabulary, cut over the tensor ranks as the output layer is."""

    def __init__(self, config: TransformerConfig, vocabulary_size: int, topology: Topology) -> None:
        super().__init__(config)
        rows = vocabulary_size // topology.config.tensor
        self.bias = torch.nn.Parameter(torch.zeros(rows, dtype=config.params_dtype))
        self.bias.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.bias.partition_dim = 0  # type: ignore[attr-defined]
        self.bias.partition_stride = 1  # type: ignore[attr-defined]
        self.tp_group = topology.groups.tp
        self._dp_cp = topology.groups.dp_cp

    def forward[T](self, use: Callable[[Tensor], T]) -> T:
        """What is made of the bias, [vocabulary / tensor], which ZeRO-3 gathers for a module's forward alone."""
        return use(self.bias)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        state = {"bias": self.bias}
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"bias": 0}, sharded_offsets, tp_group=self.tp_group, dp_cp_group=self._dp_cp
        )


class Classifier(torch.nn.Module):
    """Logits of classes at every token, whole on each tensor rank; the objective's weights say which tokens count.

    As `transformers` has it: an encoder tells the class of a text through a pooler; a causal model without a bias.
    """

    def __init__(
        self, config: TransformerConfig, topology: Topology, *, classes: int, pooled: bool, bias: bool
    ) -> None:
        super().__init__()
        partial = config.sequence_parallel
        self.pooler = Dense(config, config.hidden_size, config.hidden_size, partial=partial) if pooled else None
        self.output = Dense(config, config.hidden_size, classes, partial=partial, bias=bias)
        self._gathered = topology.sequence_parallel
        self._group = topology.groups.tp

    def forward(self, hidden: Tensor) -> Tensor:
        """[own, batch, hidden] -> [sequence / context, batch, classes]."""
        if self.pooler is not None:
            hidden = torch.tanh(self.pooler(hidden))
        logits = self.output(hidden)
        if not self._gathered:
            return logits
        # Every tensor rank computes the same loss from all of them: its gradient is cut, not added up.
        return gather_from_sequence_parallel_region(logits, tensor_parallel_output_grad=False, group=self._group)


class NextSentenceHead(torch.nn.Module):
    """From the first token of each row: whether its second segment follows the first one in their document."""

    def __init__(self, config: TransformerConfig, topology: Topology) -> None:
        super().__init__()
        self.pooler = Dense(config, config.hidden_size, config.hidden_size, partial=False)
        self.classifier = Dense(config, config.hidden_size, 2, partial=False)
        self._topology = topology

    def forward(self, hidden: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> [batch, 2], the same on all tensor ranks.

        Under context parallelism only the first rank has the first token; the others' answers have no weight.
        """
        first = hidden[0]
        if self._topology.sequence_parallel:
            mine = first if self._topology.tensor_rank == 0 else first * 0
            first = reduce_from_tensor_model_parallel_region(mine)
        return self.classifier(torch.tanh(self.pooler(first)))
