"""How a tensor of ours and those of Hugging Face's format are made of each other.

A `Pair` names one global tensor of a checkpoint of ours, the tensors on the other side, and the two functions between
them, each the exact inverse of the other: they move numbers and never compute with them. A family is a list of pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One tensor of ours and what it is elsewhere."""

    ours: str
    """Global name in a checkpoint."""
    theirs: tuple[str, ...]
    """Names of the tensors that it is made of."""
    split: Callable[[Tensor], Sequence[Tensor]]
    """Ours to theirs, in the order of their names."""
    join: Callable[[Sequence[Tensor]], Tensor]
    """Theirs to ours."""
    filling: int = 0
    """Last rows of ours, zeros, that nothing elsewhere stands for (`filled_up`)."""


def same(ours: str, theirs: str) -> Pair:
    """A tensor that is the same on both sides."""
    return Pair(ours=ours, theirs=(theirs,), split=lambda tensor: [tensor], join=lambda tensors: tensors[0])


def transposed(ours: str, theirs: str) -> Pair:
    """A matrix that is stored [in, out] elsewhere."""
    return Pair(
        ours=ours, theirs=(theirs,), split=lambda tensor: [tensor.T], join=lambda tensors: tensors[0].T.contiguous()
    )


def reversed_rows(ours: str, theirs: str) -> Pair:
    """A tensor whose rows stand in the other order."""
    return Pair(
        ours=ours, theirs=(theirs,), split=lambda tensor: [tensor.flip(0)], join=lambda tensors: tensors[0].flip(0)
    )


def vocabulary(ours: str, theirs: str, config: ModelConfig) -> Pair:
    """Rows by token; ours are filled up with zeros to the vocabulary size, elsewhere those rows are missing."""
    padded, rows = config.vocabulary_size, config.unpadded_vocabulary_size or config.vocabulary_size
    assert padded is not None
    assert rows is not None

    def fill(tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        if padded == rows:
            return tensor
        return torch.cat((tensor, tensor.new_zeros(padded - rows, *tensor.shape[1:])))

    return Pair(ours=ours, theirs=(theirs,), split=lambda tensor: [tensor[:rows]], join=fill, filling=padded - rows)


def filled_up(weight: Tensor, filling: int) -> Tensor:
    """A weight whose last rows are the mean of the others.

    As zeros they would be tokens of logit 0, and many a model's other logits are far below that: of GPT-2 those rows
    would have nearly all probability. The exponential of a mean is at most the mean of the exponentials, so as means
    they have at most their share of the rows.
    """
    if filling:
        exact = torch.promote_types(weight.dtype, torch.float32)
        weight[-filling:] = weight[:-filling].mean(dim=0, dtype=exact)
    return weight


def halves(ours: str, theirs: tuple[str, str]) -> Pair:
    """A gated MLP's first matrix: the gate above, what it gates below."""
    return Pair(
        ours=ours, theirs=theirs, split=lambda tensor: tensor.chunk(2), join=lambda tensors: torch.cat([*tensors])
    )


def _head_rows(config: ModelConfig) -> tuple[int, int, int]:
    """Groups of query heads, query heads of a group, and rows of a head."""
    groups = config.kv_heads or config.heads
    return groups, config.heads // groups, config.head_size or config.hidden_size // config.heads


def _apart(tensor: Tensor, config: ModelConfig) -> list[Tensor]:
    """Ours, group after group its queries, its key, its value -> all queries, all keys, all values."""
    groups, queries, rows = _head_rows(config)
    fused = tensor.view(groups, queries + 2, rows, *tensor.shape[1:])
    return [part.reshape(-1, *tensor.shape[1:]) for part in fused.split((queries, 1, 1), dim=1)]


def _together(tensors: Sequence[Tensor], config: ModelConfig) -> Tensor:
    groups, _, rows = _head_rows(config)
    rest = tensors[0].shape[1:]
    return torch.cat([tensor.view(groups, -1, rows, *rest) for tensor in tensors], dim=1).reshape(-1, *rest)


def queries_keys_values(ours: str, theirs: tuple[str, str, str], config: ModelConfig) -> Pair:
    """The fused projection, weight or bias, against three of them."""
    return Pair(
        ours=ours,
        theirs=theirs,
        split=lambda tensor: _apart(tensor, config),
        join=lambda tensors: _together(tensors, config),
    )


def keys_values(ours: str, theirs: tuple[str, str], config: ModelConfig) -> Pair:
    """The fused projection of cross attention, head after head its key and its value, against two of them."""
    rows = config.head_size or config.hidden_size // config.heads

    def split(tensor: Tensor) -> list[Tensor]:
        heads = tensor.view(config.heads, 2, rows, -1)
        return [part.reshape(config.heads * rows, -1) for part in heads.unbind(dim=1)]

    def join(tensors: Sequence[Tensor]) -> Tensor:
        heads = [tensor.view(config.heads, rows, -1) for tensor in tensors]
        return torch.stack(heads, dim=1).reshape(2 * config.heads * rows, -1)

    return Pair(ours=ours, theirs=theirs, split=split, join=join)


def fused_queries_keys_values(ours: str, theirs: str, config: ModelConfig) -> Pair:
    """The fused projection against one [in, queries | keys | values] matrix, or its bias (GPT-2)."""
    groups, queries, rows = _head_rows(config)
    sizes = (groups * queries * rows, groups * rows, groups * rows)
    return Pair(
        ours=ours,
        theirs=(theirs,),
        split=lambda tensor: [_turned(torch.cat(_apart(tensor, config)))],
        join=lambda tensors: _together(_turned(tensors[0]).split(sizes), config),
    )


def _turned(tensor: Tensor) -> Tensor:
    """A matrix transposed; a bias as it is."""
    return tensor.T if tensor.ndim == 2 else tensor


def experts(ours: str, theirs: str, config: ModelConfig) -> Pair:
    """[experts, out, in] against a matrix an expert; `{expert}` in their name."""
    return Pair(
        ours=ours,
        theirs=tuple(theirs.format(expert=expert) for expert in range(config.moe.experts)),
        split=lambda tensor: tensor.unbind(),
        join=lambda tensors: torch.stack([*tensors]),
    )


def gated_experts(ours: str, theirs: tuple[str, str], config: ModelConfig) -> Pair:
    """[experts, gate and gated, in] against two matrices an expert; `{expert}` in their names."""
    names = tuple(name.format(expert=expert) for expert in range(config.moe.experts) for name in theirs)
    return Pair(
        ours=ours,
        theirs=names,
        split=lambda tensor: [half for expert in tensor.unbind() for half in expert.chunk(2)],
        join=lambda tensors: torch.cat([*tensors]).view(config.moe.experts, -1, tensors[0].shape[1]),
    )
