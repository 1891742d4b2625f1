"""Muon: a momentum whose update is made orthogonal, for matrices (Jordan et al., 2024; Liu et al., 2025).

The numbers are those of `torch.optim.Muon`, to which it is tested to be equal, bit for bit, where both iterate in bf16.
torch's always does; here a matrix on the CPU keeps its own precision (bf16 is slow there), so that the proofs of
layouts, which run there, can ask for float64's exactness.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from parallel.config import MuonConfig, MuonScale

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of the quintic iteration, which is steepest at zero."""
_TINY = 1e-7


class Muon(torch.optim.Optimizer):
    """Groups as torch's optimizers take them, of matrices only, with `lr` and `weight_decay`."""

    def __init__(
        self, groups: Iterable[Mapping[str, Any]], *, config: MuonConfig, precision: torch.dtype | None = None
    ) -> None:
        """`precision` is what the iteration computes in; by default bf16 on an accelerator, the matrix's own else."""
        super().__init__([dict(group) for group in groups], {"lr": 0.0, "weight_decay": 0.0})
        self._config = config
        self._precision = precision

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every matrix that has a gradient."""
        assert closure is None
        momentum = self._config.momentum
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                if "momentum_buffer" not in self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = cast(Tensor, self.state[matrix]["momentum_buffer"])
                average.lerp_(matrix.grad, 1 - momentum)
                direction = matrix.grad.lerp(average, momentum) if self._config.nesterov else average
                update = orthogonal(direction, self._config.iterations, self._precision)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-group["lr"] * length(matrix.shape, self._config.scale))


def orthogonal(matrix: Tensor, iterations: int, precision: torch.dtype | None = None) -> Tensor:
    """[rows, columns] with its singular values brought near 1, by Newton-Schulz iterations."""
    if precision is None:
        precision = torch.bfloat16 if matrix.device.type != "cpu" else matrix.dtype
    tall = matrix.shape[0] > matrix.shape[1]
    found = (matrix.T if tall else matrix).to(precision, copy=True)
    found.div_(found.norm().clamp(min=_TINY))
    for _ in range(iterations):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), found, beta=_A)
    return found.T if tall else found


def length(shape: torch.Size, scale: MuonScale) -> float:
    """By what an orthogonal update is multiplied besides the learning rate."""
    rows, columns = shape
    if scale is MuonScale.original:
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
