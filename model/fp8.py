"""Products of a block's matrices in eight-bit floating point (`precision: fp8`); everything else stays bf16.

The idea: weights and activations become e4m3 (3 bits of fraction, up to 448), gradients e5m2 (2 bits, up to 57,344),
each scaled as a tensor so that its largest element is the format's (Micikevicius et al., 2022, arXiv:2209.05433).
Scales are those of the tensor itself at each use, not of a history: no state, nothing to save, the same in every
layout, and no host waits for one. Sums are of full precision; masters, moments and gradient sums are fp32 as in bf16.

Of its input a product keeps the eight bits alone, half of what bf16 keeps. Embedding, output layer, norms, attention's
scores and routers stay in bf16, as everybody leaves them; so do experts, whose numbers of tokens fit no kernel's tiles.

The trade-off: a product's gradients are some 6 % from exact ones, which 300 steps of training do not show in the loss
(tests/model/test_fp8.py); and without a fusing compiler each scale is a pass over memory.
"""

from typing import Any

import torch
from torch import Tensor

ACTIVATIONS, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2


def quantised(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor in eight bits and the float32 number [] to multiply these by."""
    most = torch.finfo(dtype).max
    scale = (tensor.abs().amax().float() / most).clamp(min=1e-30)
    return (tensor.float() / scale).clamp(-most, most).to(dtype), scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """[..., inputs], [outputs, inputs] -> [..., outputs]."""
        own, scale = quantised(hidden.flatten(0, -2), ACTIVATIONS)
        matrix, matrix_scale = quantised(weight, ACTIVATIONS)
        ctx.save_for_backward(own, scale, weight)
        found = _multiplied(own, scale, matrix.t(), matrix_scale, hidden.dtype, fast=True)
        return found.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        own, scale, weight = ctx.saved_tensors
        (result,) = gradients
        gradient, gradient_scale = quantised(result.flatten(0, -2), GRADIENTS)
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            matrix, matrix_scale = quantised(weight, ACTIVATIONS)
            of_hidden = _multiplied(gradient, gradient_scale, _by_columns(matrix), matrix_scale, result.dtype)
            of_hidden = of_hidden.view(*result.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            rows = gradient.t().contiguous()
            of_weight = _multiplied(rows, gradient_scale, _by_columns(own), scale, weight.dtype)
        return of_hidden, of_weight


def _multiplied(
    left: Tensor, scale: Tensor, right: Tensor, right_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """`left` lies in memory by rows and `right` by columns, as the kernels want them; `fast` sums of some 22 bits."""
    return torch._scaled_mm(left, right, scale_a=scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast)


def _by_columns(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`."""
    found = _Product.apply(hidden, weight)
    return found if bias is None else found + bias
