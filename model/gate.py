"""The gate of SwiGLU and GeGLU as one operation, in megatron-core's slot for an activation.

The idea: of activation(gate) x up only the input is kept, both halves in one tensor as the matrix before it gave them;
what the activation gave is computed again, and the halves' gradients are written where they belong. Made of single
operations, as megatron-core does it without a compiler, the activation and the second half would be kept besides, and
the gradients copied together.

Source: Shazeer, 2020, arXiv:2002.05202.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu, silu

from model.config import Activation

_BACKWARD = torch.ops.aten
_KERNELS: dict[Activation, tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, str]]] = {
    Activation.swiglu: (silu, _BACKWARD.silu_backward.grad_input, {}),
    Activation.geglu: (gelu, _BACKWARD.gelu_backward.grad_input, {"approximate": "tanh"}),
}
"""The activation, what its backward pass writes into a tensor that is given, and options of both."""


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, kind: Activation) -> Tensor:
        """[..., 2 x width] -> [..., width]."""
        activation, _, options = _KERNELS[kind]
        ctx.kind = kind
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return activation(gate, **options).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        activation, into, options = _KERNELS[ctx.kind]
        found = torch.empty_like(both)
        (gate, up), (of_gate, of_up) = both.chunk(2, dim=-1), found.chunk(2, dim=-1)
        torch.mul(gradients[0], activation(gate, **options), out=of_up)
        into(gradients[0] * up, gate, **options, grad_input=of_gate)
        return found, None


class Gate(torch.nn.Module):
    """The first half's activation times the second half."""

    def __init__(self, *, config: TransformerConfig, kind: Activation) -> None:
        super().__init__()
        del config  # it is megatron-core that builds this
        self.kind = kind

    def forward(self, both: Tensor) -> Tensor:
        """[..., 2 x width] -> [..., width]."""
        return _Gated.apply(both, self.kind)
