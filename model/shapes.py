"""The parameters of a rank as arithmetic: name and size of each, in the order in which the model makes them.

What the planner needs a thousand times a second, and without torch. It is held against the model itself: the list is
that of `launcher.explain.sizes`, which builds the model without memory, element by element
(tests/model/test_shapes.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import Classified, ModelConfig, Norm, Position
from model.families import begins_anew
from model.mup import learning_rate_factor, width
from model.projections import ROW_PARALLEL, A, B, adapted, is_adapter
from model.size import has_experts, head_size
from parallel.config import OptimizerConfig
from parallel.memory import Size
from parallel.rules import is_frozen, setting, state_words


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One parameter, before tensor ranks cut it."""

    name: str
    whole: tuple[int, ...]
    is_cut: bool = True
    """Whether tensor ranks share it."""
    is_expert: bool = False
    learning_rate_factor: float = 1.0
    is_frozen: bool = False
    """Whether adapters leave it as it is."""

    def size(self, tensor: int, optimizer: OptimizerConfig) -> Size:
        """What memory depends on, on one of some tensor ranks."""
        elements, is_matrix = math.prod(self.whole), len(self.whole) > 1
        own = setting(self.name, is_matrix=is_matrix, config=optimizer, factor=self.learning_rate_factor)
        return Size(
            elements=elements // tensor if self.is_cut else elements,
            group=f"{is_matrix} {own}",
            is_expert=self.is_expert,
            is_frozen=self.is_frozen or is_frozen(self.name, optimizer),
            whole_elements=elements,
            state_elements=state_words(self.name, self.whole, optimizer),
        )


def chunk_shapes(
    config: ModelConfig,
    layers: range,
    *,
    vocabulary_size: int,
    expert: int,
    first: bool,
    last: bool,
    sequence_length: int = 0,
) -> Iterator[Shape]:
    """The parameters of consecutive layers on one expert rank, with the embedding on the `first` chunk and the final
    norm and output layer on the `last`."""
    shapes = _chunk(config, layers, vocabulary_size, expert, first, last, sequence_length)
    if config.lora.rank is not None:
        shapes = (
            shape if is_adapter(shape.name) or begins_anew(config, shape.name) else replace(shape, is_frozen=True)
            for shape in shapes
        )
    if width(config) == 1:
        yield from shapes
        return
    for shape in shapes:
        factor = learning_rate_factor(shape.name, is_matrix=len(shape.whole) > 1, config=config)
        yield replace(shape, learning_rate_factor=factor)


def _chunk(
    config: ModelConfig,
    layers: range,
    vocabulary_size: int,
    expert: int,
    first: bool,
    last: bool,
    sequence_length: int,
) -> Iterator[Shape]:
    hidden = config.hidden_size
    if first:
        yield Shape(name="embedding.word_embeddings.weight", whole=(vocabulary_size, hidden))
        if config.position is Position.learned:
            rows = config.positions or sequence_length
            yield Shape(name="embedding.position_embeddings.weight", whole=(rows, hidden), is_cut=False)
    for layer in layers:
        yield from _block(config, layer, expert)
    if last:
        yield from _norm(config, "decoder.final_norm", hidden)
        if config.classes.number:
            yield Shape(name="classifier.output.weight", whole=(config.classes.number, hidden), is_cut=False)
            if config.classes.of is Classified.tokens:
                yield Shape(name="classifier.output.bias", whole=(config.classes.number,), is_cut=False)
        elif not (config.tie_embeddings and first):
            name = "embedding.word_embeddings.weight" if config.tie_embeddings else "output_layer.weight"
            yield Shape(name=name, whole=(vocabulary_size, hidden))


def _block(config: ModelConfig, layer: int, expert: int) -> Iterator[Shape]:
    hidden, query = config.hidden_size, config.heads * head_size(config)
    heads = query + 2 * (config.kv_heads or config.heads) * head_size(config)
    name = f"decoder.layers.{layer}"
    yield from _norm(config, f"{name}.input_layernorm", hidden)
    yield Shape(name=f"{name}.self_attention.linear_proj.weight", whole=(hidden, query))
    if config.linear_bias:
        yield Shape(name=f"{name}.self_attention.linear_proj.bias", whole=(hidden,), is_cut=False)
    yield from _adapters(config, f"{name}.self_attention.linear_proj")
    yield Shape(name=f"{name}.self_attention.linear_qkv.weight", whole=(heads, hidden))
    if config.attention_bias or config.linear_bias:
        yield Shape(name=f"{name}.self_attention.linear_qkv.bias", whole=(heads,))
    yield from _adapters(config, f"{name}.self_attention.linear_qkv")
    if config.qk_norm:
        for part in "qk":
            norm = f"{name}.self_attention.{part}_layernorm.weight"
            yield Shape(name=norm, whole=(head_size(config),), is_cut=False)
    yield from _norm(config, f"{name}.pre_mlp_layernorm", hidden)
    if not has_experts(config, layer):
        yield from _mlp(config, f"{name}.mlp", config.ffn_hidden_size, has_adapters=True)
        return
    moe = config.moe
    yield Shape(name=f"{name}.mlp.router.weight", whole=(moe.experts, hidden), is_cut=False)
    for _ in range(moe.experts // expert):
        width = moe.ffn_hidden_size or config.ffn_hidden_size
        yield from _mlp(config, f"{name}.mlp.experts.experts", width, is_expert=True)
    if moe.shared_ffn_hidden_size:
        yield from _mlp(config, f"{name}.mlp.shared_experts", moe.shared_ffn_hidden_size)


def _mlp(
    config: ModelConfig, name: str, width: int, *, is_expert: bool = False, has_adapters: bool = False
) -> Iterator[Shape]:
    into = width * (2 if config.activation.gated else 1)
    yield Shape(name=f"{name}.linear_fc1.weight", whole=(into, config.hidden_size), is_expert=is_expert)
    if config.linear_bias:
        yield Shape(name=f"{name}.linear_fc1.bias", whole=(into,))
    if has_adapters:
        yield from _adapters(config, f"{name}.linear_fc1")
    yield Shape(name=f"{name}.linear_fc2.weight", whole=(config.hidden_size, width), is_expert=is_expert)
    if config.linear_bias:
        yield Shape(name=f"{name}.linear_fc2.bias", whole=(config.hidden_size,), is_cut=False)
    if has_adapters:
        yield from _adapters(config, f"{name}.linear_fc2")


def _adapters(config: ModelConfig, name: str) -> Iterator[Shape]:
    """Those on a matrix: of one that is cut by its inputs A is cut so, of another B by its outputs."""
    linear, rank = name.rpartition(".")[2], config.lora.rank
    for part in adapted(config, linear):
        assert rank is not None
        is_row = linear in ROW_PARALLEL
        yield Shape(name=f"{name}.{part.name}.{A}", whole=(rank, part.inputs), is_cut=is_row)
        yield Shape(name=f"{name}.{part.name}.{B}", whole=(part.outputs, rank), is_cut=not is_row)


def _norm(config: ModelConfig, name: str, hidden: int) -> Iterator[Shape]:
    for part in ("weight", "bias") if config.norm is Norm.layer else ("weight",):
        yield Shape(name=f"{name}.{part}", whole=(hidden,), is_cut=False)
