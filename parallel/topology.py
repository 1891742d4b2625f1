"""Who this process is in the layout, and the process groups that go with it.

The one place that talks to megatron-core's `parallel_state`: everything else is handed a `Topology` and takes groups
from it. Ranks are numbered tensor-fastest, then context, then data, then pipeline (megatron-core's default order), so
that the ranks that talk most sit on one node.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from parallel import cpu
from parallel.common.errors import ConfigError, Problem
from parallel.config import ParallelConfig
from parallel.context import ContextParallel


def data_parallel_size(config: ParallelConfig, world_size: int) -> int:
    """How many ranks hold different samples: world size / (tensor x pipeline x context).

    Raises:
        ConfigError: the world size is not a multiple of tensor x pipeline x context.
    """
    model_ranks = config.tensor * config.pipeline * config.context
    if world_size % model_ranks:
        legal = f"tensor x pipeline x context to divide the {world_size} ranks of this run, and it is {model_ranks}"
        raise ConfigError([Problem(key="parallel.tensor", got=config.tensor, legal=legal)])
    return world_size // model_ranks


def add_up(tensor: torch.Tensor, group: ProcessGroup | None = None) -> None:
    """The sum over the ranks of a group (by default all), in place; one rank has it already, and no thread is asked."""
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(tensor, group=group)


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """One rank's coordinates and groups; made once, at assembly, by `Topology.create`."""

    config: ParallelConfig
    rank: int
    world_size: int
    device: torch.device
    tensor_rank: int
    pipeline_rank: int
    data_parallel_rank: int
    data_parallel_size: int
    groups: ProcessGroupCollection
    """megatron-core's groups: `tp`, `pp`, `cp`, `dp_cp`, `ep`, `embd` and so on."""
    model_parallel_group: ProcessGroup
    """The ranks that together hold one copy of what is not an expert: tensor x pipeline."""
    context: ContextParallel
    """This rank's part of each sequence."""

    @classmethod
    def create(cls, config: ParallelConfig, *, device: torch.device | None = None) -> "Topology":
        """Builds the groups; `torch.distributed` is initialised, and every rank calls this.

        Raises:
            ConfigError: the world size does not fit the layout.
        """
        world_size = torch.distributed.get_world_size()
        replicas = data_parallel_size(config, world_size)
        cpu.install()
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if cpu.has_gpu() else torch.device("cpu")
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor,
            pipeline_model_parallel_size=config.pipeline,
            virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
            context_parallel_size=config.context,
            expert_model_parallel_size=config.expert,
            expert_tensor_parallel_size=config.tensor,
            create_gloo_process_groups=False,  # nobody asks for them
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return cls(
            config=config,
            rank=torch.distributed.get_rank(),
            world_size=world_size,
            device=device,
            tensor_rank=groups.tp.rank(),
            pipeline_rank=groups.pp.rank(),
            data_parallel_rank=groups.dp.rank(),
            data_parallel_size=replicas,
            groups=groups,
            model_parallel_group=groups.mp,
            context=ContextParallel(rank=groups.cp.rank(), size=config.context, group=groups.cp),
        )

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations outside the matrices are cut along the sequence (`auto`: where tensor > 1)."""
        if self.config.sequence_parallel == "auto":
            return self.config.tensor > 1
        return self.config.sequence_parallel and self.config.tensor > 1

    @property
    def is_first_pipeline_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_pipeline_stage(self) -> bool:
        return self.pipeline_rank == self.config.pipeline - 1

    @property
    def data_parallel_group(self) -> ProcessGroup:
        """The ranks that hold the same part of the model and different tokens: data x context."""
        return self.groups.dp_cp

    @property
    def expert_data_parallel_group(self) -> ProcessGroup:
        """The ranks that hold the same experts and different tokens: data x context / expert."""
        return self.groups.expt_dp

    @property
    def expert_model_parallel_group(self) -> ProcessGroup:
        """The ranks that together hold one copy of all experts: tensor x expert x pipeline."""
        return self.groups.tp_ep_pp

    @property
    def embedding_group(self) -> ProcessGroup | None:
        """First and last pipeline stage, on the ranks that hold a copy of a tied embedding; else None."""
        return self.groups.embd if self.config.pipeline > 1 else None

    def describe(self) -> Mapping[str, Any]:
        """The layout as plain JSON, for manifests, histories and reports."""
        return {
            "world_size": self.world_size,
            "tensor": self.config.tensor,
            "sequence_parallel": self.sequence_parallel,
            "pipeline": self.config.pipeline,
            "virtual_pipeline": self.config.virtual_pipeline,
            "pipeline_split": self.config.pipeline_split,
            "context": self.config.context,
            "expert": self.config.expert,
            "data": self.data_parallel_size,
            "zero_stage": self.config.zero_stage,
        }
