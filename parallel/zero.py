"""ZeRO stages 1, 2 and 3: DeepSpeed shards what the optimizer holds over the data-parallel ranks.

Source: Rajbhandari et al., 2020, arXiv:1910.02054. DeepSpeed was not made to be driven by megatron-core's schedules;
what this module does about it, each point held by the gradient matrix of tests/distributed/test_gradients.py:

- Stages 2 and 3 reduce and partition gradients during each backward, as DeepSpeed does by itself. It resets its
  bookkeeping only at a forward, while a pipeline's last backward passes follow each other, so that their reduction
  would be skipped without a word; the reset is done here, at the start of each backward.
- Stage 1 accumulates whole gradients in fp32 and reduces them once, after the last backward. So does stage 2 where its
  own way cannot work (interleaved stages; an embedding tied over a pipeline), and then shards what stage 1 shards.
- A tied embedding's two copies are added up before that reduction, because ZeRO partitions the two differently.
- bf16 weights keep fp32 masters, moments and gradient sums in every stage; DeepSpeed's separate bf16 optimizer (whole,
  unsharded gradients) is never used.
- The shared-memory all-reduce that DeepSpeed compiles where it finds a compiler stays off, so that a CPU's numbers do
  not depend on whether there is one.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import deepspeed.comm
import deepspeed.ops
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    logger,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor

from parallel.config import OptimizerConfig
from parallel.optimizer import Kind, adamw, create_state, reduce_tied, set_steps
from parallel.parameters import LocalParameter
from parallel.topology import Topology

_BUCKET_ELEMENTS = 50_000_000
"""Gradients travel in buckets of at most this many elements (200 MB in fp32); a buffer of that size is allocated."""


class _ModelParallelUnit:
    """The layout under the names by which DeepSpeed asks for it."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_model_parallel_rank(self) -> int:
        return self._topology.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.config.tensor

    def get_model_parallel_group(self) -> Any:
        return self._topology.model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_parallel_group.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data_parallel_group.size()

    def get_data_parallel_group(self) -> Any:
        return self._topology.data_parallel_group


class _Engine(DeepSpeedEngine):
    """DeepSpeed's engine with the ZeRO optimizer wherever one was asked for."""

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> Literal["zero_optimization"]:
        super()._do_optimizer_sanity_check(basic_optimizer)
        return "zero_optimization"

    def _backward_prologue_per_tensor(self, grad: Tensor) -> Tensor:
        """Leaves a gradient as it is: micro-batches are weighed by their tokens, not by their number."""
        return grad


def _deepspeed_configuration(
    *, stage: int, dtype: torch.dtype, clip_norm: float, topology: Topology, largest: int
) -> dict[str, Any]:
    bucket = min(_BUCKET_ELEMENTS, largest)
    return {
        "train_batch_size": topology.data_parallel_group.size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "contiguous_gradients": stage > 1,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket + bucket % 2,
            "stage3_param_persistence_threshold": 0,
        },
    }


def _effective_stage(parameters: Sequence[LocalParameter], topology: Topology) -> int:
    """The stage that DeepSpeed runs: the configured one, or 1 where gradients cannot be partitioned in backward."""
    layout = topology.config
    tied_over_pipeline = layout.pipeline > 1 and any(local.tied for local in parameters)
    if layout.zero_stage == 2 and (layout.virtual_pipeline > 1 or tied_over_pipeline):
        return 1
    return layout.zero_stage


class ZeroUpdater:
    """Gradients to a step through DeepSpeed ZeRO."""

    def __init__(
        self,
        module: torch.nn.Module,
        parameters: Sequence[LocalParameter],
        *,
        config: OptimizerConfig,
        topology: Topology,
    ) -> None:
        logger.setLevel(logging.WARNING)
        self.parameters = parameters
        self.topology = topology
        self.stage = _effective_stage(parameters, topology)
        self.gradient_scale = float(topology.data_parallel_group.size())
        self._in_backward = self.stage >= 2
        unit = _ModelParallelUnit(topology)
        os.environ.setdefault("LOCAL_RANK", str(topology.device.index or 0))  # asked for by DeepSpeed, nowhere used
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)
        for local in parameters:
            local.parameter.ds_pipe_replicated = local.tied_copy  # type: ignore[attr-defined]
        configuration = _deepspeed_configuration(
            stage=self.stage,
            dtype=parameters[0].parameter.dtype,
            clip_norm=config.clip_norm,
            topology=topology,
            largest=max(1024, sum(local.shape.numel() for local in parameters)),
        )
        self.module = self._engine = _Engine(
            args=None,
            model=module,
            optimizer=adamw(parameters, [local.parameter for local in parameters], config),
            mpu=unit,
            dist_init_required=False,
            config=configuration,
            config_class=DeepSpeedConfig(configuration, unit),
        )
        self._zero: Any = self._engine.optimizer
        self._create_state()
        if self._in_backward:
            module.register_forward_hook(self._reset_at_backward)
        elif parameters[0].parameter.dtype != torch.float32:
            for local in parameters:
                local.parameter.register_post_accumulate_grad_hook(self._zero._fill_param_grad_accum_attribute)

    def _create_state(self) -> None:
        """Creates the moments at once; DeepSpeed would at the first step, too late to load a checkpoint into them."""
        if self.stage == 3:
            for flat in self._zero.fp32_partitioned_groups_flat:
                self._zero.optimizer.param_groups[0]["params"] = [flat]
                create_state(self._zero.optimizer)
            self._zero.optimizer.param_groups[0]["params"] = []
        else:
            create_state(self._zero.optimizer)
            self._zero._lazy_init_hp_params_optimizer_state()

    def _reset_at_backward(self, _module: torch.nn.Module, _inputs: Any, output: Tensor) -> None:
        """Before DeepSpeed sees the gradient of an output, makes it count that backward as a new one."""
        state = self._zero._backward_hook_state

        def reset(gradient: Tensor) -> Tensor:
            state.backward_active_depth = 0
            state.reset_for_new_step()
            return gradient

        if output.requires_grad:
            output.register_hook(reset)

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        if self._in_backward:
            yield
            return
        with self._engine.coalesce_grad_reduction():
            yield
            reduce_tied(
                self.parameters,
                [self._zero.get_gradient_for_reduction(local.parameter) for local in self.parameters],
                self.topology,
            )

    @contextmanager
    def _boundary_at_the_end(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def all_but_last_micro_batch(self) -> AbstractContextManager[None]:
        return self._boundary_at_the_end() if self._in_backward else nullcontext()

    def step(self, learning_rate: float) -> Tensor:
        for group in self._zero.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return torch.as_tensor(self._zero._global_grad_norm)

    def gradient(self, local: LocalParameter) -> Tensor:
        gradient = safe_get_full_grad(local.parameter)
        assert gradient is not None
        return gradient.view(local.shape)

    def get(self, local: LocalParameter, kind: Kind) -> Tensor:
        if kind is Kind.weight:
            value = safe_get_full_fp32_param(local.parameter)
        else:
            value = safe_get_full_optimizer_state(local.parameter, kind.value)
        assert value is not None
        return value.view(local.shape)

    @torch.no_grad()
    def put(self, values: Iterator[tuple[LocalParameter, Kind, Tensor]]) -> None:
        for local, kind, value in values:
            if kind is Kind.weight:
                safe_set_full_fp32_param(local.parameter, value)
            else:
                safe_set_full_optimizer_state(local.parameter, value, kind.value)
        self._round()

    def _round(self) -> None:
        """Makes the weights of the forward pass follow the masters, on all ranks."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)

    def set_steps_taken(self, steps: int) -> None:
        set_steps(self._zero.optimizer, steps)
