"""What a layer knows about the tokens of a micro-batch beside their hidden states.

It travels in the slot that megatron-core passes, untouched, from the model to each layer and its attention
(`packed_seq_params`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Bias = Callable[[int, int, int], Tensor]
"""(first query, queries, keys) of a document -> what is added to their scores, [heads, queries, keys]."""


class Piece(NamedTuple):
    """Some queries that follow each other, and the keys that they attend to: the first of a document."""

    length: int
    """Queries."""
    document: int
    start: int
    """Place of the first query in its document."""
    keys: int
    causal: bool
    """Whether each query sees the keys up to its own place, the last one all `keys`; otherwise each sees all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """How a micro-batch falls into attentions that do not cross a document."""

    documents: list[int]
    """Lengths of the documents of the flattened [batch, sequence] of the keys, over whole rows."""
    queries: list[Piece]
    """This rank's queries in their order, [batch, sequence / context] flattened."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerContext:
    """Made once a forward pass, shared by all layers. `sequence` is this rank's part under context parallelism; `own`
    is what it holds between the matrices: sequence / tensor under sequence parallelism, else sequence."""

    rotation: tuple[Tensor, Tensor] | None
    """Cosines and sines of the rotary positions, each [sequence, batch, 1, rotary channels] of the model's dtype, the
    first half of the sines negated; None without rotary positions."""
    local_rotation: tuple[Tensor, Tensor] | None = None
    """The same for layers with a window, where they have a base of their own."""
    pieces: Pieces | None
    """None where each row is one document, whole on this rank."""
    dropout_keys: Tensor | None
    """[own, batch] int64, a number for each token; None without dropout."""
    all_dropout_keys: Tensor | None = None
    """The same of all tokens of `sequence`, [sequence, batch]."""
    weights: Tensor | None
    """[own, batch] float32: how much each token's loss counts; None where nothing in a layer asks."""
    loss_factor: Tensor | None
    """[] by what a loss that a layer adds is to be multiplied; None outside of training."""
    bias: Bias | None = None
    """What the places of a query and a key add to their score; None where positions are told otherwise."""
    qkv_format: str = "sbhd"
    """Read by megatron-core: activations keep their [sequence, batch, head, head_size] shape."""
