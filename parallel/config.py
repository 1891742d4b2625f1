"""Configuration of the room that knows ranks: layout, optimizer, checkpoints. Imports without torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class Precision(StrEnum):
    """Number format of weights and activations. Masters, moments and accumulated gradients are fp32 in all of them."""

    auto = "auto"
    """bf16 on an accelerator that has it, else fp32."""
    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"
    """With dynamic loss scaling; for accelerators that have no bf16."""


class Recompute(StrEnum):
    """Which activations are thrown away in the forward pass and computed again in the backward pass."""

    none = "none"
    selective = "selective"
    """Those inside attention (Korthikanti et al., 2022, arXiv:2205.05198): much memory for little computing."""
    full = "full"
    """All but each block's input: least memory, one more forward pass."""


class ScheduleName(StrEnum):
    """Shape of the learning rate after its warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"
    """Warm-up, stable, decay: constant until the last `decay_steps`, then linear."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """Activation recomputation: memory for computing."""

    mode: Recompute = Recompute.none
    blocks: int | None = None
    """How many blocks of each pipeline chunk recompute, from its first; by default all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The layout. Data parallelism is derived: ranks / (tensor x pipeline x context)."""

    tensor: int = 1
    """Ranks that share every layer's matrices."""
    pipeline: int = 1
    """Ranks that share the depth of the model, in stages that pass activations on."""
    virtual_pipeline: int = 1
    """Chunks of layers that each pipeline rank holds; more chunks, smaller bubble, more messages."""
    pipeline_split: list[int] | None = None
    """Layers of each pipeline chunk, first to last (pipeline x virtual_pipeline numbers); by default equal shares."""
    context: int = 1
    """Ranks that share each sequence; every one holds 1 / context of its tokens."""
    expert: int = 1
    """Ranks, out of those that hold different tokens (data x context), that share each layer's experts."""
    sequence_parallel: Literal["auto", True, False] = "auto"
    """Cut activations outside the matrices along the sequence over the tensor ranks; auto: on where tensor > 1."""
    zero_stage: int = 1
    """What is sharded over data-parallel ranks. 0 nothing, 1 masters and moments, 2 also gradients, 3 also weights."""
    offload: bool = False
    """Keep masters and moments in the host's memory and step there (ZeRO stages 1 to 3)."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the steps: a linear warm-up from zero, then `name`."""

    name: ScheduleName = ScheduleName.cosine
    warmup_steps: int = 0
    """Steps of the linear warm-up."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step (not used by `constant`)."""
    decay_steps: int | None = None
    """Length of the final decay of `wsd` in steps; by default a tenth of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), none on norms and biases."""

    learning_rate: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay per step, times the learning rate; matrices only."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


class BestMetric(StrEnum):
    """By what a checkpoint is better than another: lower is better."""

    validation_loss = "validation_loss"
    """Of the checkpoints whose step was evaluated, too (`evaluate.every_steps`)."""
    loss = "loss"
    """Training loss of the checkpoint's own step: noisy."""


class LoadParts(StrEnum):
    """What a run takes from the checkpoint that it starts from."""

    everything = "everything"
    """Weights, moments, schedule, progress and the place in the data: the run goes on after that step."""
    weights = "weights"
    """Weights alone: the run begins at step 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, which stay, what a run starts from. The last step and a stop are always saved."""

    every_steps: int = 1000
    """Steps between two checkpoints."""
    every_seconds: float | None = None
    """Also save where so much time has passed since the last save, on rank 0's clock."""
    keep: int = 3
    """Newest whole checkpoints that stay; at least 1."""
    keep_every_steps: int | None = None
    """Checkpoints of every so many steps stay for ever."""
    keep_best: int = 0
    """How many checkpoints stay for having the lowest `best_by`."""
    best_by: BestMetric = BestMetric.validation_loss
    load: str | None = None
    """Checkpoint of another run that a run without one of its own starts from: a step directory, RUN or RUN@STEP."""
    load_parts: LoadParts = LoadParts.everything
    fallback: bool = False
    """Where the newest checkpoint is damaged, put it aside and go on from the newest whole one, instead of stopping."""
    mirror: str | None = None
    """Where committed checkpoints are copied to, a path or a URL that fsspec knows (`s3://bucket/run`)."""
    allow_changes: list[str] = field(default_factory=list)
    """What may differ from the run's last attempt though it changes the numbers: keys or sections of this
    configuration, `code`, `versions`."""
    asynchronous: bool = False
    """Copy to the host's memory, go on training, and write from there: needs as much memory as a rank writes."""
