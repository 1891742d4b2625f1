"""Candidates for fused paths: engines built or changed in another way, which `accelerator.py` measures beside ours."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import silu

import model.attention
from model.attention import DocumentAttention
from model.gate import Gate
from parallel.config import Logits
from parallel.engine import Engine


def compile_layers(engine: Engine) -> None:
    """Each layer under torch.compile; it breaks where a layer looks at what is no tensor."""
    for module in engine.updater.module.modules():
        if isinstance(module, TransformerLayer):
            module.forward = torch.compile(module.forward)


def compile_small_parts(engine: Engine) -> None:
    """Norms, gates and rotary positions under torch.compile."""
    model.attention.rotate = torch.compile(model.attention.rotate)
    for module in engine.updater.module.modules():
        if isinstance(module, Gate):
            module.forward = torch.compile(_gated)
        elif "Norm" in type(module).__name__:
            module.forward = torch.compile(module.forward)


def _gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return silu(gate) * up


def attend_in_one_kernel(_engine: Engine) -> None:
    """All documents of a micro-batch by one call of flash attention."""
    DocumentAttention._by_document = _documents  # type: ignore[method-assign]


def _documents(_self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Any, _bias: Any) -> Any:
    sequence, batch = query.shape[:2]
    borders = torch.tensor([0, *accumulate(pieces.documents)], dtype=torch.int32).pin_memory()
    borders = borders.to(query.device, non_blocking=True)
    query, key, value = (each.transpose(0, 1).flatten(0, 1) for each in (query, key, value))
    longest = max(pieces.documents)
    found = varlen_attn(query, key, value, borders, borders, longest, longest, window_size=(-1, 0))
    assert isinstance(found, torch.Tensor)
    return found.view(batch, sequence, -1).transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a case is built otherwise, and what is changed in its engine then."""

    layout: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Engine], None] = lambda _engine: None
    in_eight_bits: bool = False
    packed: bool = False
    """Only where there are documents."""


VARIANTS = {
    "unchanged": Variant(),
    "whole logits": Variant(layout={"logits": Logits.whole}),
    "fp8": Variant(in_eight_bits=True),
    "fp8, compiled layers": Variant(in_eight_bits=True, change=compile_layers),
    "compiled small parts": Variant(change=compile_small_parts),
    "compiled layers": Variant(change=compile_layers),
    "documents in one kernel": Variant(change=attend_in_one_kernel, packed=True),
}
