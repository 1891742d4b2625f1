"""Which number format weights and activations have on this machine."""

import torch

from parallel.config import Precision
from parallel.cpu import has_gpu


def on_this_machine(precision: Precision) -> Precision:
    """What weights and activations are: `auto` is bf16 on an accelerator that has it, else fp32; fp8 is bf16."""
    if precision is Precision.fp8:
        return Precision.bf16
    if precision is not Precision.auto:
        return precision
    return Precision.bf16 if has_gpu() and torch.cuda.is_bf16_supported() else Precision.fp32


def model_dtype(precision: Precision) -> torch.dtype:
    """The dtype of `precision` here."""
    dtypes = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32, Precision.fp16: torch.float16}
    return dtypes[on_this_machine(precision)]


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, which sums and losses are taken in; float64 stays, for the proofs."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
