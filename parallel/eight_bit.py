"""AdamW whose moments are bytes: 2 bytes a parameter where there were 8.

Dettmers et al., 2021, arXiv:2110.02861: of each 256 elements the largest is kept in float32, and every element as one
of 256 levels between, fine near zero. The kernels are bitsandbytes' (the extra `bnb`), on accelerators and on CPUs.
Levels belong to blocks of the whole flattened parameter, so a parameter is stepped whole and every layout gives the
same bytes. Vectors, small matrices and what `optimizer.adamw_8bit.leave_to_adamw` names (embeddings, whose gradients
are uneven) keep float32 moments, as the paper advises.
"""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from parallel.common.lazy import Lazy
from parallel.config import OptimizerConfig
from parallel.rules import CODE, eight_bit_shapes

kernels = Lazy("bitsandbytes.functional")


class AdamW8bit(torch.optim.Optimizer):
    """Groups as torch's optimizers take them, with `lr` and `weight_decay`."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], *, config: OptimizerConfig) -> None:
        super().__init__([dict(group) for group in groups], {"lr": 0.0, "weight_decay": 0.0})
        self._betas, self._eps = config.betas, config.eps
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of kernels that are not for optimizers
        self._levels = [kernels.create_dynamic_map(signed=signed) for signed in (True, False)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.contiguous(), group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name, shape in eight_bit_shapes(tuple(parameter.shape)).items():
                dtype = torch.uint8 if name.endswith(CODE) else torch.float32
                state[name] = torch.zeros(shape, dtype=dtype, device=parameter.device)
        state["step"] += 1
        first, second = (levels.to(parameter.device) for levels in self._levels)
        kernels.optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            parameter,
            state["exp_avg_code"],
            state["exp_avg_sq_code"],
            *self._betas,
            0.0,  # the next two are AdEMAMix's
            0.0,
            self._eps,
            int(state["step"]),
            group["lr"],
            first,
            second,
            state["exp_avg_scale"],
            state["exp_avg_sq_scale"],
            group["weight_decay"],
        )
