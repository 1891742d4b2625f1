"""Bytes that one micro-batch's forward pass keeps for its backward pass, as arithmetic.

The idea is Korthikanti et al., 2022, arXiv:2205.05198, section 4: count the tensors that each operation saves. The
operations are those of `model.specs` and `model.attention`: attention keeps no matrix of scores, and rotary positions
and residual sums are operations of their own, so that more is kept than in a fused layer. A frozen matrix keeps
nothing: what it reads is kept where an adapter on it reads that too, and what comes before the first adapter of the
model is not kept at all.

Tested to within 5 % of what autograd's saved-tensor hooks see on a CPU, and of what a block that computes itself again
holds without their seeing it (tests/model/test_activations.py); but for its random states, which lie in the host's
memory. Experts are taken to get equal shares of the tokens. Imports without torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from model.config import ModelConfig, Norm, Position
from model.projections import ROW_PARALLEL, adapted
from model.size import has_experts, head_size
from parallel.config import Recompute, RecomputeConfig


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch as one rank sees it."""

    samples: int
    sequence: int
    """Tokens of a sample on this rank: train.sequence_length / context."""
    tensor: int
    context: int
    sequence_parallel: bool
    """Whether what lies between the matrices is cut over the tensor ranks."""
    width: int
    """Bytes of an element of the model's dtype."""
    packed: bool = True
    """Whether samples hold several documents, so that attention goes document by document."""
    logit_rows: int | None = None
    """Tokens whose logits are there at a time; None: all."""

    @cached_property
    def tokens(self) -> int:
        """Of all samples, on this rank."""
        return self.samples * self.sequence

    @cached_property
    def between(self) -> int:
        """Tokens that this rank holds between the matrices."""
        return self.tokens // self.tensor if self.sequence_parallel else self.tokens


def chunk_bytes(config: ModelConfig, layers: range, batch: MicroBatch, recompute: RecomputeConfig) -> int:
    """Of a chunk's blocks, of which the first few may recompute, and what they share."""
    again = len(layers) if recompute.blocks is None else recompute.blocks
    found = shared_bytes(config, batch)
    for part, mode in ((layers[:again], recompute.mode), (layers[again:], Recompute.none)):
        mixtures = sum(has_experts(config, layer) for layer in part)
        if mixtures:
            found += mixtures * block_bytes(config, batch, mode, experts=True)
        if len(part) > mixtures:
            found += (len(part) - mixtures) * block_bytes(config, batch, mode, experts=False)
        if part and part.start == 0 and _is_frozen(config):
            experts = has_experts(config, 0)
            found += block_bytes(config, batch, mode, experts=experts, first=True)
            found -= block_bytes(config, batch, mode, experts=experts)
    return found


def embedding_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Of the first chunk besides its blocks."""
    if _is_frozen(config):
        return 0
    ids = 8 * batch.tokens * (2 if config.position is Position.learned else 1)
    return ids + (batch.width * config.hidden_size * batch.between if config.dropout else 0)


def shared_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Of a chunk, once for all of its blocks: cosines and sines, which a block that computes itself again holds too."""
    return 2 * head_size(config) * batch.width * batch.tokens if config.position is Position.rope else 0


def output_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Of the last chunk besides its blocks, but for the logits: the final norm, whose result chunks do not keep."""
    learns = not (_is_frozen(config) or batch.logit_rows) or config.classes.number
    return _norm_input(config, batch) + (batch.width * config.hidden_size * batch.between if learns else 0)


def logits_bytes(config: ModelConfig, vocabulary_size: int, batch: MicroBatch) -> tuple[int, int]:
    """What the cross-entropy keeps, and the most that is there at one time. Whole: probabilities in fp32; the logits,
    these in fp32, and their gradient. In chunks: gradients of hidden states and of the matrix, this in fp32 where there
    are several; a chunk's logits and their gradient besides, and its part of the matrix's."""
    share = config.classes.number or vocabulary_size // batch.tensor  # those of classes are whole on each tensor rank
    if batch.logit_rows is None:
        logits = batch.tokens * share
        return 4 * logits + 8 * batch.tokens, (batch.width + 8) * logits
    matrix, exact = 0 if _is_frozen(config) else share * config.hidden_size, max(4, batch.width)
    several = batch.logit_rows < batch.tokens
    kept = batch.width * batch.tokens * config.hidden_size + (exact if several else batch.width) * matrix
    chunk = min(batch.logit_rows, batch.tokens) * share
    narrow = batch.width * (chunk + (matrix if several else 0)) if batch.width < 4 else 0
    return kept, kept + exact * chunk + narrow


class _Part(NamedTuple):
    """Of a block: some operations, and a matrix that reads what they gave."""

    kept: int
    """Bytes that the operations keep for the gradients of what they read."""
    linear: str
    """The matrix as its module is called; empty where it is several, or never has adapters."""
    read: int
    """Bytes of what it reads."""
    is_kept: bool = False
    """Whether the operations keep that themselves."""


def block_bytes(
    config: ModelConfig, batch: MicroBatch, recompute: Recompute, *, experts: bool, first: bool = False
) -> int:
    """Of one block, with a mixture of experts or an MLP; `first`: what it reads asks for no gradient."""
    hidden = batch.width * config.hidden_size * batch.between
    if recompute is Recompute.full:
        return hidden
    dropped = hidden if config.dropout else 0
    found, learns = 0, not first
    for part in _parts(config, batch, again=recompute is Recompute.selective, experts=experts):
        if learns:
            found += part.kept
        if not _is_frozen(config):
            found += 0 if part.is_kept else part.read
        elif part.linear:
            found += _adapters(config, batch, part, learns=learns)
            learns = learns or bool(adapted(config, part.linear))
    return found + 2 * dropped


def _parts(config: ModelConfig, batch: MicroBatch, *, again: bool, experts: bool) -> Iterator[_Part]:
    """In the order of the forward pass, dropout left out."""
    width, hidden = batch.width, batch.width * config.hidden_size * batch.between
    norm = _norm_input(config, batch)
    attended = width * config.heads * head_size(config) * batch.tokens // batch.tensor
    is_view = not (again or batch.packed or batch.context > 1)  # else documents' results are put together again
    attention = _attention(config, batch, again=again)
    yield _Part(kept=norm, linear="linear_qkv", read=hidden)
    yield _Part(kept=attention - (0 if is_view else attended), linear="linear_proj", read=attended, is_kept=is_view)
    if experts:
        yield _Part(kept=norm + _experts(config, batch), linear="", read=hidden)
        return
    product = width * config.ffn_hidden_size // batch.tensor * batch.tokens
    inner = _inner(config, config.ffn_hidden_size, batch) * batch.tokens
    yield _Part(kept=norm, linear="linear_fc1", read=hidden)
    yield _Part(kept=inner - product, linear="linear_fc2", read=product)


def _is_frozen(config: ModelConfig) -> bool:
    return config.lora.rank is not None


def _adapters(config: ModelConfig, batch: MicroBatch, part: _Part, *, learns: bool) -> int:
    """Of those on a frozen matrix: what they read, and what A gives of it to B. With dropout each reads something else,
    and `learns` says whether a gradient goes through the mask."""
    count = len(adapted(config, part.linear))
    tokens = batch.between if part.linear in ROW_PARALLEL else batch.tokens
    low = batch.width * (config.lora.rank or 0) * tokens
    if config.lora.dropout:
        return count * (low + part.read * (2 if learns else 1))
    return count * low + (part.read if count and not (part.is_kept and learns) else 0)


def _norm_input(config: ModelConfig, batch: MicroBatch) -> int:
    """Of a norm, whose input is the residual stream; statistics in fp32."""
    statistics = 8 if config.norm is Norm.layer else max(4, batch.width)
    return batch.between * (batch.width * config.hidden_size + statistics)


def _attention(config: ModelConfig, batch: MicroBatch, *, again: bool) -> int:
    """Queries, keys and values as attention takes them, its result, and a number for each head.

    Values are a view of what the projection gave, which is kept whole then; gathered or cut into documents they are
    a copy.
    """
    width, tokens = batch.width, batch.tokens
    query = config.heads * head_size(config) * tokens // batch.tensor
    key_value = (config.kv_heads or config.heads) * head_size(config) * tokens // batch.tensor
    copied = not again and (batch.context > 1 or (batch.packed and batch.samples > 1))
    head_norms = _head_norms(config, batch, query, key_value, copied=copied) if config.qk_norm else 0
    if again:
        made = query + key_value if config.qk_norm else _gathered_queries(config, batch, query)
        return head_norms + width * (made + (query + 2 * key_value) + query)
    rotated = config.position is Position.rope or config.qk_norm
    if copied:
        kept = query + 2 * key_value * batch.context
    else:
        made = query + key_value if rotated else _gathered_queries(config, batch, query)
        kept = made + query + 2 * key_value
    pieces = query if batch.packed or batch.context > 1 else 0  # documents' results, put together again
    statistics = 4 * config.heads // batch.tensor * tokens
    return head_norms + width * (kept + query + pieces) + statistics


def _gathered_queries(config: ModelConfig, batch: MicroBatch, query: int) -> int:
    """Queries of the groups of a rank: in the projection a key and a value stand between two groups', so that several
    groups of several are copied, while one group's, or one query's for each key, are a view."""
    groups = (config.kv_heads or config.heads) // batch.tensor
    return query if 1 < groups < config.heads // batch.tensor else 0


def _head_norms(config: ModelConfig, batch: MicroBatch, query: int, key_value: int, *, copied: bool) -> int:
    """What their inputs add, and a number a head. Keys are a view of the projection, which is kept for that even where
    attention takes a copy of the values."""
    projection = query + 2 * key_value if copied else 0
    statistics = max(4, batch.width) * (query + key_value) // head_size(config)
    return batch.width * (_gathered_queries(config, batch, query) + projection) + statistics


def _experts(config: ModelConfig, batch: MicroBatch) -> int:
    moe = config.moe
    copies = batch.tokens * moe.top_k
    width = moe.ffn_hidden_size or config.ffn_hidden_size
    product = batch.width * width // batch.tensor  # weighed by its score, it is another one
    expert = _inner(config, width, batch) + product
    router = batch.between * (8 * moe.experts + 12 * moe.top_k + 20)
    shared = _inner(config, moe.shared_ffn_hidden_size or 0, batch) * batch.tokens
    if _is_frozen(config):
        expert -= product
        shared -= batch.width * (moe.shared_ffn_hidden_size or 0) // batch.tensor * batch.tokens
    else:
        expert += batch.width * config.hidden_size
        router += 4 * config.hidden_size * batch.between if batch.width < 4 else 0  # its input in fp32
    return copies * (expert + 28) + router + shared


def _inner(config: ModelConfig, width: int, batch: MicroBatch) -> int:
    """For one token: what the first matrix gave, both halves of a gate, and the input of the second."""
    return (3 if config.activation.gated else 2) * batch.width * width // batch.tensor
