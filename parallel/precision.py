"""Which number format weights and activations have on this machine."""

import torch

from parallel.config import Precision
from parallel.cpu import has_gpu


def model_dtype(precision: Precision) -> torch.dtype:
    """The dtype of `precision`; `auto` is bf16 on an accelerator that has it, else fp32."""
    if precision is Precision.auto:
        return torch.bfloat16 if has_gpu() and torch.cuda.is_bf16_supported() else torch.float32
    return {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32, Precision.fp16: torch.float16}[precision]
