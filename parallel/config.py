"""Configuration of the room that knows ranks: layout, optimizer, checkpoints. Imports without torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from omegaconf import MISSING


class Precision(StrEnum):
    """Number format of weights and activations. Masters, moments and accumulated gradients are fp32 in all of them."""

    auto = "auto"
    """bf16 on an accelerator that has it, else fp32."""
    bf16 = "bf16"
    fp32 = "fp32"
    fp16 = "fp16"
    """With dynamic loss scaling; for accelerators that have no bf16."""
    fp8 = "fp8"
    """bf16 whose blocks multiply their matrices in eight bits, scaled per tensor at each use; for tensor = 1."""


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
    inverse_sqrt = "inverse_sqrt"
    """Falls with the root of the step (Vaswani et al., 2017, arXiv:1706.03762): a run of any length, no end in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """Activation recomputation: memory for computing."""

    mode: Recompute = Recompute.none
    blocks: int | None = None
    """How many blocks of each pipeline chunk recompute, from its first; by default all."""


class Logits(StrEnum):
    """What is there of the logits while cross-entropy is computed in training."""

    chunked = "chunked"
    """Some rows at a time."""
    whole = "whole"


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
    logits: Logits = Logits.chunked
    """Cross-entropy some rows at a time, with less memory and, on a CPU, in less time; or of all logits at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate over the steps: a linear warm-up from zero, then `name`."""

    name: ScheduleName = ScheduleName.cosine
    warmup_steps: int = 0
    """Steps of the linear warm-up."""
    min_learning_rate: float = 0.0
    """Learning rate at the last step; of `inverse_sqrt` the lowest; not used by `constant`."""
    decay_steps: int | None = None
    """Length of the final decay of `wsd` in steps; by default a tenth of the run."""


class MuonScale(StrEnum):
    """How long an orthogonal update is, for a matrix of `rows` x `columns`."""

    match_rms_adamw = "match_rms_adamw"
    """0.2 x sqrt(max(rows, columns)): as long as AdamW's, so that its learning rates and decay hold (Liu et al., 2025,
    arXiv:2502.16982)."""
    original = "original"
    """sqrt(max(1, rows / columns)) (Jordan et al., 2024)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MuonConfig:
    """Muon: momentum, orthogonalised by a Newton-Schulz iteration, for the matrices inside the layers."""

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    """Newton-Schulz steps."""
    scale: MuonScale = MuonScale.match_rms_adamw
    leave_to_adamw: list[str] = field(default_factory=lambda: ["embedding", "output_layer", "lm_head", "router"])
    """Regular expressions of names of matrices that AdamW steps, as it does all vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdafactorConfig:
    """Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235), with torch's meaning of its numbers."""

    decay: float = -0.8
    """Exponent of the step in the second moment's decay."""
    min_scale: float = 1e-3
    """Smallest size of a parameter that its step is relative to."""
    clip: float = 1.0
    """Largest root mean square of an update."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EightBitConfig:
    """AdamW whose moments are bytes (Dettmers et al., 2021, arXiv:2110.02861), by bitsandbytes."""

    leave_to_adamw: list[str] = field(default_factory=lambda: ["embedding"])
    """Regular expressions of names of matrices whose moments stay float32, as those of vectors and of matrices of fewer
    than 4096 elements do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupConfig:
    """What some parameters get instead of the rest."""

    pattern: str = MISSING
    """Regular expression that is searched in the parameter's name, as `bloomery checkpoint inspect` shows it."""
    learning_rate_factor: float = 1.0
    """Times the scheduled learning rate."""
    weight_decay: float | None = None
    """Instead of `optimizer.weight_decay`; by default that on matrices, 0 on the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019), none on norms and biases, or another `name`."""

    name: str = "adamw"
    """adamw, adamw_8bit, muon, adafactor, or one that a plugin registers."""
    learning_rate: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.1
    """Decoupled decay per step, times the learning rate; matrices only."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    adafactor: AdafactorConfig = field(default_factory=AdafactorConfig)
    adamw_8bit: EightBitConfig = field(default_factory=EightBitConfig)
    groups: list[GroupConfig] = field(default_factory=list)
    """Learning rate and decay of some parameters; the first pattern that fits a name counts."""
    frozen: list[str] = field(default_factory=list)
    """Regular expressions of names of parameters that are not trained: no gradient, no optimizer state."""
    average_decay: float | None = None
    """Keep an exponential average of the weights with this decay a step (0.999); by default there is none."""
    options: dict[str, Any] = field(default_factory=dict)
    """What a plugin's optimizer wants to know, by names of its own."""
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
    weights_and_moments = "weights_and_moments"
    """Weights and AdamW's moments with the count of their steps: the run begins at step 0 of its schedule and data."""
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
    failures: int = 0
    """How many saves in a row may fail, for want of room or of a file server, while training goes on; the next one ends
    the run, and so does the last save if it fails."""
