"""What the matrices of attention and MLP are called in the field, and where LoRA's adapters sit on them.

megatron-core keeps several projections in one matrix: their rows follow each other in turns (of each group of heads its
queries, its key, its value), or one after the other (gate, up). An adapter belongs to one projection, as `peft` has it,
so that its A and B mean the same on both sides. Imports without torch.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import ModelConfig
from parallel.common.errors import Problem

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCK, CROSSING = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), ("linear_q", "linear_kv", "linear_proj")
"""Matrices of a block, and of the cross attention that a decoder's block has besides."""
ROW_PARALLEL = ("linear_proj", "linear_fc2")
"""Matrices that tensor ranks cut by their inputs; the others are cut by their outputs."""
A, B = "lora_A", "lora_B"


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """A matrix as the field counts them, whole."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fused:
    """The projections of one of our matrices, in the order of their rows."""

    parts: tuple[Projection, ...]
    turns: int = 1
    """How many times their rows take turns, over all tensor ranks."""


def projections(config: ModelConfig, linear: str) -> Fused | None:
    """Those of a matrix by the name of its module, `linear_qkv`; None for a matrix that gets no adapters."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    head, groups = config.head_size or hidden // config.heads, config.kv_heads or config.heads

    def made(name: str, outputs: int, inputs: int = hidden) -> Projection:
        return Projection(name=f"{name}_proj", inputs=inputs, outputs=outputs)

    match linear:
        case "linear_qkv":
            parts = made("q", config.heads * head), made("k", groups * head), made("v", groups * head)
            return Fused(parts=parts, turns=groups)
        case "linear_q":
            return Fused(parts=(made("q", config.heads * head),))
        case "linear_kv":
            return Fused(parts=(made("k", groups * head), made("v", groups * head)), turns=config.heads)
        case "linear_proj":
            return Fused(parts=(made("o", hidden, config.heads * head),))
        case "linear_fc1":
            return Fused(parts=(made("gate", ffn), made("up", ffn)) if config.activation.gated else (made("up", ffn),))
        case "linear_fc2":
            return Fused(parts=(made("down", hidden, ffn),))
    return None


def targets(config: ModelConfig) -> tuple[str, ...]:
    """The projections that get an adapter."""
    if config.lora.rank is None:
        return ()
    return tuple(config.lora.targets) or _legal(config)


def adapted(config: ModelConfig, linear: str) -> tuple[Projection, ...]:
    """Those of a matrix that get an adapter, in the order of their rows."""
    wanted = targets(config)
    found = projections(config, linear) if wanted else None
    return () if found is None else tuple(part for part in found.parts if part.name in wanted)


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its global name, belongs to an adapter."""
    return name.endswith((f".{A}", f".{B}"))


def has_adapter(config: ModelConfig, name: str) -> bool:
    """Whether it belongs to one that this model has."""
    return is_adapter(name) and name.split(".")[-2] in targets(config)


def scale(config: ModelConfig) -> float:
    """What the product of B and A is multiplied by."""
    rank, alpha = config.lora.rank, config.lora.alpha
    assert rank is not None
    return 1.0 if alpha is None else alpha / rank


def adapter_parameters(config: ModelConfig, *linears: str) -> int:
    """Those of the adapters on one matrix of each of these names."""
    return sum(
        (config.lora.rank or 0) * (part.inputs + part.outputs) for name in linears for part in adapted(config, name)
    )


def problems(config: ModelConfig) -> Iterator[Problem]:
    """What of `model.lora` this model cannot have."""
    lora, legal = config.lora, _legal(config)
    if lora.rank is None:
        return
    if config.latent.kv_rank is not None:
        said = "null with model.latent: its projections down to a latent have no adapters yet"
        yield Problem(key="model.lora.rank", got=lora.rank, legal=said)
        return
    if not 0 <= lora.dropout < 1:
        yield Problem(key="model.lora.dropout", got=lora.dropout, legal="a share from 0 to below 1")
    elif lora.dropout and config.decoder_layers is not None:
        said = "0 with model.decoder_layers: what cross attention reads is of another stream than what it writes"
        yield Problem(key="model.lora.dropout", got=lora.dropout, legal=said)
    for name in lora.targets:
        if name not in legal:
            near = difflib.get_close_matches(name, legal, n=1)
            said = f"{near[0]}, if that was meant" if near else f"some of {', '.join(legal)}, which this model has"
            if config.moe.experts and name in TARGETS:
                said = f"some of {', '.join(legal)}: experts have no adapters"
            yield Problem(key="model.lora.targets", got=name, legal=said)


def _legal(config: ModelConfig) -> tuple[str, ...]:
    names = TARGETS[:4] if config.moe.experts else TARGETS
    return tuple(name for name in names if name != "gate_proj" or config.activation.gated)
