"""Norms that are right under sequence parallelism, and fast on a CPU.

Under sequence parallelism each tensor rank sees its own part of the sequence, so a weight's gradient is a sum over the
tensor ranks; the weight is read through an operation whose backward is that sum, inside the graph, before ZeRO reduces
anything.

On an accelerator torch has one kernel for RMSNorm; on a CPU it is made of some ten operations, and `OneRMSNorm` takes a
third of their time and keeps what the kernel keeps: its input and a number a token.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from parallel.precision import exact


class OneRMSNorm(torch.autograd.Function):
    """`torch.nn.functional.rms_norm` over the last dimension, in float32 (float64 in float64), as one operation.

    With x the input, w the weight, r = 1 / sqrt(mean(x^2) + eps) and g the gradient of x r w:
    of x it is r (g w - x r^2 mean(g w x)), of w the sum over tokens of g x r.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., channels], [channels] -> as the first."""
        wide, scale = exact(hidden), exact(weight)
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).double()
        inverse = norms.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_().to(wide.dtype)
        ctx.save_for_backward(hidden, weight, inverse)
        return (wide * inverse).mul_(scale).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, inverse = ctx.saved_tensors
        wide, gradient, channels = exact(hidden), exact(gradients[0]), hidden.shape[-1]
        product = gradient * wide
        means = (product @ exact(weight))[..., None].mul_(inverse.pow(3).div_(-channels))
        of_hidden = (gradient * exact(weight)).mul_(inverse).addcmul_(wide, means)
        of_weight = product.mul_(inverse).view(-1, channels).sum(dim=0)  # more exact than a product with `inverse`
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.partial = config.sequence_parallel
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, hidden: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> the same shape."""
        weight = copy_to_tensor_model_parallel_region(self.weight) if self.partial else self.weight
        if self.zero_centered:
            weight = 1 + weight
        if hidden.device.type == "cpu":
            return OneRMSNorm.apply(hidden, weight, self.eps)
        return rms_norm(hidden, self.weight.shape, weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Norm by mean and variance; weight and bias are read under sequence parallelism as those of `RMSNorm`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        self.partial = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[sequence, batch, hidden] -> the same shape."""
        weight, bias = self.weight, self.bias
        if self.partial:
            weight, bias = copy_to_tensor_model_parallel_region(weight), copy_to_tensor_model_parallel_region(bias)
        return layer_norm(hidden, self.weight.shape, weight, bias, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm over each query or key head: a tensor rank sees its own heads only, sequence parallel or not."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.partial = config.tensor_model_parallel_size > 1


def norm(config: TransformerConfig, hidden_size: int, eps: float) -> RMSNorm | LayerNorm:
    return (RMSNorm if config.normalization == "RMSNorm" else LayerNorm)(config, hidden_size, eps)
