"""What an estimate asks of a model over and over, computed once. Imports without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from model.config import ModelConfig
from model.projections import BLOCK, ROW_PARALLEL, adapted
from model.shapes import Shape, chunk_shapes
from model.size import flops_per_token, has_experts, head_size, parameter_count
from parallel.config import OptimizerConfig
from parallel.memory import Size
from parallel.rules import is_frozen


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """On a frozen matrix."""

    inputs: int
    outputs: int
    is_row: bool
    """Whether tensor ranks cut the matrix by its inputs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a token costs in one block, before any cut."""

    matrices: int
    """Parameters of the matrices that it passes."""
    held: int
    """Parameters of all of the block's matrices but its experts'."""
    held_in_experts: int
    query: int
    key_value: int
    narrowest: int
    """Width of the narrowest matrix."""
    tokens_share: float
    """Of the tokens, those that a matrix product of an expert sees."""
    inner: int
    """Elements that the MLP's operations between its matrices read and write."""
    fused_inner: int
    rotated: int
    """Elements of queries and keys that are turned."""
    adapters: Sequence[Adapter] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """Of one model at one length; compared and hashed as an object, so that it is a cheap key."""

    model: ModelConfig
    vocabulary_size: int
    sequence_length: int
    optimizer: OptimizerConfig
    mixtures_before: tuple[int, ...]
    """Layers with experts before each layer, and in all."""
    work: dict[bool, Work]
    """Of a block with an MLP (False) or with experts (True), where the model has such."""
    flops: dict[bool, float]
    """Of a token, counted causal (True) or full."""
    parameters: dict[bool, int]
    """Trained (True) and frozen."""
    sizes: dict[int, dict[Shape, Size]] = field(default_factory=dict)
    """What parameters were found to be on one of so many tensor ranks; filled while they are asked for."""

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        *,
        vocabulary_size: int,
        sequence_length: int,
        optimizer: OptimizerConfig | None = None,
    ) -> "Facts":
        """Computes them; by default for AdamW."""
        kinds = [has_experts(model, layer) for layer in range(model.layers)]
        return cls(
            model=model,
            vocabulary_size=vocabulary_size,
            sequence_length=sequence_length,
            optimizer=optimizer or OptimizerConfig(),
            mixtures_before=(0, *accumulate(map(int, kinds))),
            parameters=_parameters(model, vocabulary_size, sequence_length, optimizer),
            work={experts: _work(model, experts) for experts in set(kinds)},
            flops={
                causal: flops_per_token(model, vocabulary_size, sequence_length, causal=causal)
                for causal in (True, False)
            },
        )

    def mixtures(self, layers: range) -> int:
        """How many of consecutive layers have experts."""
        return self.mixtures_before[layers.stop] - self.mixtures_before[layers.start]

    def blocks(self, *, experts: bool) -> int:
        """How many of all layers have experts, or have none."""
        return self.mixtures_before[-1] if experts else self.model.layers - self.mixtures_before[-1]


def unknown(model: ModelConfig, vocabulary_size: int) -> str | None:
    """What the arithmetic does not know of a model yet, in words; None where it knows all of it."""
    if model.attention_softcap is not None:
        return "model.attention_softcap"
    if model.parallel_residual:
        return "model.parallel_residual"
    same = sum(_parameters(model, vocabulary_size, 1).values()) == parameter_count(model, vocabulary_size, 1)
    return None if same else f"all parameters of the family {model.family}"


def _parameters(
    model: ModelConfig, vocabulary_size: int, sequence_length: int, optimizer: OptimizerConfig | None = None
) -> dict[bool, int]:
    """Of the whole model, those that are trained (True) and those that are not."""
    found = {True: 0, False: 0}
    for shape in chunk_shapes(
        model,
        range(model.layers),
        vocabulary_size=vocabulary_size,
        expert=1,
        first=True,
        last=True,
        sequence_length=sequence_length,
    ):
        frozen = shape.is_frozen or (optimizer is not None and is_frozen(shape.name, optimizer))
        found[not frozen] += math.prod(shape.whole)
    return found


def _work(model: ModelConfig, experts: bool) -> Work:
    hidden, query = model.hidden_size, model.heads * head_size(model)
    key_value = (model.kv_heads or model.heads) * head_size(model)
    gated, moe = model.activation.gated, model.moe
    matrices_in_mlp = 3 if gated else 2
    width = (moe.ffn_hidden_size or model.ffn_hidden_size) if experts else model.ffn_hidden_size
    shared = (moe.shared_ffn_hidden_size or 0) if experts else width
    chosen = moe.top_k * width if experts else 0
    held = hidden * (2 * query + 2 * key_value + matrices_in_mlp * shared + (moe.experts if experts else 0))
    passed = chosen + shared
    return Work(
        matrices=held + matrices_in_mlp * hidden * chosen,
        held=held,
        held_in_experts=matrices_in_mlp * hidden * width * moe.experts if experts else 0,
        query=query,
        key_value=key_value,
        narrowest=min(query, width),
        tokens_share=moe.top_k / moe.experts if experts else 1.0,
        inner=passed * ((7 if gated else 2) + (3 if experts else 0)) + (8 * hidden * moe.top_k if experts else 0),
        fused_inner=passed * (3 if gated else 2) + (6 * hidden * moe.top_k if experts else 0),
        rotated=query + key_value,
        adapters=tuple(
            Adapter(inputs=part.inputs, outputs=part.outputs, is_row=linear in ROW_PARALLEL)
            for linear in (BLOCK[:2] if experts else BLOCK)
            for part in adapted(model, linear)
        ),
    )
