"""ZeRO stages 2 and 3, and 1 to 3 with the optimizer on the host: DeepSpeed shards over the data-parallel ranks.

Source: Rajbhandari et al., 2020, arXiv:1910.02054. What is sharded and when gradients are reduced in which layout is
`parallel.mechanism`'s decision; this module carries it out. DeepSpeed was not made to be driven by megatron-core's
schedules; what is done about it, each point held by the proofs of tests/layouts.yaml:

- Where gradients are reduced in the backward pass, the schedule says which micro-batch is the last. DeepSpeed resets
  its bookkeeping only at a forward, while a pipeline's last backward passes follow each other, so that their reduction
  would be skipped without a word; the reset is done here, at the start of each backward.
- Where they are reduced at the end, whole gradients accumulate in fp32. A tied embedding's two copies are added up
  before that reduction, because ZeRO partitions the two differently.
- bf16 and fp16 weights keep fp32 masters, moments and gradient sums in every stage; DeepSpeed's separate bf16 optimizer
  (whole, unsharded gradients) is never used. Its loss scaling knows only a loss that is a scalar of its own graph; ours
  is in the gradient that the schedule starts from, and DeepSpeed is told the scale to divide by.
- With `offload`, masters and moments and their AdamW are on the host: torch's, so that nothing has to be compiled.
- DeepSpeed looks for no compiler: its shared-memory all-reduce would make a CPU's numbers depend on whether there is
  one, and trying out what it could compile takes a third of a second. And fp16 is allowed on every CPU, since torch
  computes it on every CPU.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import deepspeed.comm
import deepspeed.module_inject.auto_ep_layer  # as below
import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer  # else the first engine of each forked rank imports it
import deepspeed.utils.groups
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import (
    logger,
    safe_get_full_grad,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed import ProcessGroup

from parallel.config import OptimizerConfig
from parallel.fragments import observed_fragments, pieces_of_fragments
from parallel.held import Tensors
from parallel.loss_scale import LossScale
from parallel.mechanism import Mechanism, Reduction, mechanism
from parallel.memory import bucket_elements
from parallel.optimizer import adamw, create_state, set_learning_rate, set_refused, set_steps
from parallel.parameters import Fragment, LocalParameter
from parallel.topology import Topology, add_up
from parallel.updater import EXPERTS, MOMENTS, Kind, Refuses, add_squares, never, reduce_tied, tensors_of


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

    def _configure_distributed_model(self, model: torch.nn.Module) -> None:
        """Sees experts that are trained by their parameters; DeepSpeed looks for its own modules."""
        super()._configure_distributed_model(model)
        self.has_moe_layers = any(is_moe_param(each) and each.requires_grad for each in model.parameters())

    def _do_sanity_check(self) -> None:
        accelerator: Any = get_accelerator()
        accelerator.is_fp16_supported = lambda: True
        super()._do_sanity_check()

    def _backward_prologue_per_tensor(self, grad: Tensor) -> Tensor:
        """Leaves a gradient as it is: micro-batches are weighed by their tokens, not by their number."""
        return grad


def _deepspeed_configuration(
    mechanism: Mechanism, *, dtype: torch.dtype, clip_norm: float, topology: Topology, elements: int
) -> dict[str, Any]:
    bucket = bucket_elements(elements)
    pinned = topology.device.type != "cpu"
    return {
        "train_batch_size": topology.data_parallel_group.size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16, "loss_scale": 1.0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": mechanism.stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": 2 * bucket,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu" if topology.config.offload else "none", "pin_memory": pinned},
        },
    }


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
        dtype = parameters[0].parameter.dtype
        self.parameters = parameters
        self.topology = topology
        self.mechanism = mechanism(
            topology.config,
            tied=any(local.tied for local in parameters),
            sharers=topology.data_parallel_group.size(),
        )
        assert self.mechanism.stage
        self.loss_scale = LossScale(dynamic=dtype == torch.float16)
        self._in_backward = self.mechanism.reduction is not Reduction.at_the_end
        unit = _ModelParallelUnit(topology)
        os.environ.setdefault("LOCAL_RANK", str(topology.device.index or 0))  # asked for by DeepSpeed, nowhere used
        ops: Any = deepspeed.ops
        ops.__compatible_ops__ = {}
        deepspeed.comm.init_distributed(dist_init_required=False, verbose=False)
        deepspeed.utils.groups._EXPERT_PARALLEL_GROUP[EXPERTS] = topology.groups.ep
        deepspeed.utils.groups._EXPERT_DATA_PARALLEL_GROUP[EXPERTS] = topology.expert_data_parallel_group
        for local in parameters:
            local.parameter.ds_pipe_replicated = local.tied_copy  # type: ignore[attr-defined]
        for parameter in module.parameters():  # frozen ones too
            parameter.group_name = EXPERTS  # type: ignore[attr-defined]  # where it is one
        configuration = _deepspeed_configuration(
            self.mechanism,
            dtype=dtype,
            clip_norm=config.clip_norm,
            topology=topology,
            elements=sum(local.shape.numel() for local in parameters),
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
        self._zero.gradient_average = False
        self._clip_norm = config.clip_norm
        self._refuses: Refuses = never
        self._found: tuple[Tensor, Tensor] | None = None
        self._local = {local.parameter: local for local in parameters}
        self._judge_norms()
        self._create_state()
        module.register_forward_hook(self._reset_at_backward)

    def _judge_norms(self) -> None:
        """Puts ourselves between DeepSpeed and its norms, which it would read."""
        if self.mechanism.stage < 3:
            self._zero.scaled_global_norm = self._judged_norm
            self._zero.unscale_and_clip_grads = self._clip
        else:
            self._zero._get_norm_groups = self._judged_groups
            self._zero.check_overflow = lambda: None  # a norm that is not finite says it, and is judged
        self._zero.check_grad_overflow = False

    @property
    def gradient_scale(self) -> float:
        return self.loss_scale.value

    def _kept_scale(self) -> float:
        """By what DeepSpeed's gradients are too large: stage 3 cannot be told to sum them instead of averaging."""
        averaged_over = self.topology.data_parallel_group.size() if self.mechanism.stage == 3 else 1
        return self.loss_scale.value / averaged_over

    def _create_state(self) -> None:
        """Creates the moments at once; DeepSpeed would at the first step, too late to load a checkpoint into them."""
        if self.mechanism.stage == 3:
            for flat in self._zero.fp32_partitioned_groups_flat:
                self._zero.optimizer.param_groups[0]["params"] = [flat]
                create_state(self._zero.optimizer)
            self._zero.optimizer.param_groups[0]["params"] = []
        else:
            create_state(self._zero.optimizer)
            self._zero._lazy_init_hp_params_optimizer_state()

    def _reset_at_backward(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        """Before DeepSpeed sees the gradient of an output, makes it count that backward as a new one, scaled by us."""
        state = self._zero._backward_hook_state

        def reset(_: Tensor) -> None:
            state.backward_active_depth = 0
            state.reset_for_new_step()
            self._engine._manual_backward_expected = True

        outputs = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        if len(outputs) == 1:
            outputs[0].register_hook(reset)
        elif outputs:  # once, before the first of them
            register_multi_grad_hook(outputs, reset, mode="any")

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

    def step(self, learning_rate: float, refuses: Refuses = never) -> tuple[Tensor, Tensor]:
        set_learning_rate(self._zero.optimizer, learning_rate)
        self._refuses = refuses
        if self.mechanism.stage == 3:
            self._zero.override_loss_scale(self._kept_scale())
        self._engine.step()
        assert self._found is not None
        (norm, refused), self._found = self._found, None
        if self._zero.overflow:
            self._zero.averaged_gradients.clear()  # left standing with offload, infinities and all
            self.follow()
        return norm, refused

    def _judged(self, total: Tensor) -> Tensor:
        """Whether the step is refused, [] 1 or 0, from the norm [] of the gradients as DeepSpeed keeps them."""
        norm = total / self._kept_scale()
        refused = self.loss_scale.refusal(norm, self._refuses)
        self._found = norm, refused
        return refused

    def _judged_groups(self) -> list[Tensor]:
        """The norms of stage 3's groups of parameters, judged together; infinite where DeepSpeed is to take no step."""
        groups = [torch.as_tensor(norm) for norm in type(self._zero)._get_norm_groups(self._zero)]
        norms = torch.stack([norm.float() for norm in groups])
        norm = torch.linalg.vector_norm(norms.where(norms >= 0, torch.nan))  # -1 is DeepSpeed's word for not finite
        return [torch.full_like(norm, torch.inf)] if self._judged(norm).item() else groups

    def _judged_norm(self) -> float:
        """Stages 1 and 2: judges the step on the device and says what the optimizer is to make of it.

        DeepSpeed gets a number that it has nothing against: it would read the norm, and wait for the device.
        """
        total = self._norm()
        refused = self._judged(total)
        norm, _ = self._found or (total, refused)
        self._factor = torch.full_like(norm, 1.0 / self._kept_scale())
        if self._clip_norm > 0:
            self._factor = 1.0 / (((norm + 1e-6) / self._clip_norm).clamp(min=1.0) * self._kept_scale())
        set_refused(self._zero.optimizer, refused.to(self._zero.single_partition_of_fp32_groups[0].device))
        return 1.0

    def _clip(self, gradients: Sequence[Tensor], _norm: float) -> None:
        """In place of DeepSpeed's, which would read the norm."""
        for gradient in gradients:
            gradient.mul_(self._factor.to(gradient.device))

    def _norm(self) -> Tensor:
        """The global norm [] of the gradients as DeepSpeed keeps them, stages 1 and 2.

        Its own sums up group by group of parameters, over all pipeline stages: it would wait for ever for a stage
        that has no experts.
        """
        zero, squares = self._zero, torch.zeros((), dtype=torch.float64, device=self.topology.device)
        for number, members in enumerate(zero.params_in_partition):
            parts = zero.offload_gradient_dict[number] if zero.cpu_offload else zero.averaged_gradients[number]
            parts = [part for part in parts if not getattr(part, "_zero_padding", False)]  # else behind all members
            add_squares(squares, zip(map(self._local.__getitem__, members), parts, strict=False), self.topology)
        add_up(squares, self.topology.data_parallel_group)
        add_up(squares, self.topology.model_parallel_group)
        return squares.sqrt()

    def gradient(self, local: LocalParameter) -> Tensor:
        gradient = safe_get_full_grad(local.parameter)
        assert gradient is not None
        return gradient.view(local.shape) / self._kept_scale()

    def kinds(self, local: LocalParameter) -> tuple[str, ...]:
        return MOMENTS

    def pieces(self, local: LocalParameter, kind: str) -> Iterable[ShardedTensor]:
        return pieces_of_fragments(self, local, kind)

    def observed(self, local: LocalParameter, kind: str) -> list[tuple[ShardedTensor, Tensor]]:
        return observed_fragments(self, local, kind)

    def fragments(self, local: LocalParameter, kind: str) -> list[Fragment]:
        key = None if kind == Kind.weight else str(kind)
        if self.mechanism.stage == 3:
            value, _ = self._zero._get_fp32_opt_state_partition(
                local.parameter, release_swap_buffers=True, optim_state_key=key
            )
            start = value.numel() * self._zero._get_param_partition_rank(local.parameter)
            elements = min(value.numel(), local.shape.numel() - start)  # the last parts are filled up
            return [Fragment(start=start, value=value.detach()[:elements])] if elements > 0 else []
        held: Any = local.parameter._hp_mapping  # type: ignore[attr-defined]
        if held is None:
            return []
        return [Fragment(start=held.lp_fragment_address.start, value=held.get_hp_fragment(key).detach())]

    def sharers(self, local: LocalParameter) -> ProcessGroup:
        topology = self.topology
        return topology.expert_data_parallel_group if local.expert else topology.data_parallel_group

    @torch.no_grad()
    def follow(self) -> None:
        if self.mechanism.stage < 3:
            self._zero.update_lp_params()
            return
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)

    def set_steps_taken(self, steps: int) -> None:
        set_steps(self._zero.optimizer, steps)

    def _weights(self) -> Iterator[torch.nn.Parameter]:
        module: Any = self._engine.module
        return module.parameters()

    def live(self) -> Tensors:
        zero = self._zero
        parameters = list(self._weights())
        tensors: dict[str, list[Tensor | None]] = {
            "moments": [value for state in zero.optimizer.state.values() for value in map(state.get, MOMENTS)],
            "gradients": [parameter.grad for parameter in parameters],
            "buffers": [],
        }
        if self.mechanism.stage == 3:
            frozen = [getattr(parameter, "ds_tensor", None) for parameter in parameters if not parameter.requires_grad]
            tensors["weights"] = [zero.lp_param_buffer, *frozen, *(parameter.data for parameter in parameters)]
            tensors["masters"] = zero.fp32_partitioned_groups_flat
            tensors["gradients"] += [zero.grad_partitions_flat_buffer]
            tensors["buffers"] += [bucket.buffer for bucket in zero.ipg_buckets.values()]
        else:
            tensors["weights"] = [*zero.bit16_groups_flat, *(parameter.data for parameter in parameters)]
            tensors["masters"] = zero.single_partition_of_fp32_groups
            tensors["gradients"] += [getattr(parameter, "grad_accum", None) for parameter in parameters]
            for groups in (zero.averaged_gradients, zero.all_grad_tensors):
                tensors["gradients"] += [tensor for group in groups.values() for tensor in group or ()]
            tensors["buffers"] += [tensor for bucket in zero.ipg_buckets.values() for tensor in bucket.buffer]
            tensors["buffers"] += [zero.grads_in_partition]
        tensors["gradients"] += [master.grad for master in tensors["masters"] if master is not None]
        if self.topology.config.offload and self.mechanism.stage < 3:
            tensors["gradients"] += zero.accumulated_grads_in_cpu.values()
            tensors["buffers"] += zero.param_buffer_of_bit16_for_cpu_offload_groups
            tensors["buffers"] += [zero.temp_grad_buffer_for_cpu_offload, zero.temp_grad_buffer_for_gpu_offload]
        return tensors
