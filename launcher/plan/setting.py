"""What an estimate is of: a model in a layout on a machine, run by some software. Imports without torch."""

from dataclasses import dataclass
from functools import cached_property

from launcher.plan.facts import Facts
from launcher.plan.hardware import Hardware
from model.activations import MicroBatch
from model.config import ModelConfig
from model.size import logit_rows
from parallel.config import Logits, ParallelConfig, Precision

WIDTHS = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp16: 2}
"""Bytes of a weight and of an activation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Software:
    """What of the communication a program hides behind computing; ours, or a peer's whose figures are published."""

    tensor: float = 1.0
    """Share of tensor parallelism's collectives that nothing hides."""
    context: float = 1.0
    """Share of context parallelism's."""
    gathers_ahead: bool = False
    """Whether updated weights are gathered behind the next forward pass, layer by layer."""
    reduces_early: bool = False
    """Whether gradients leave during the last backward passes in interleaved pipelines too."""
    fused: bool = False
    """Whether gate, rotary positions and residual sums are one pass over memory each."""
    block_seconds: float = 1e-3
    """Least time of a block's forward pass: the host's, to start its kernels."""
    in_parts: bool = True
    """Whether reducing gradients to their owners, and gathering weights from them, each cost half an all-reduce; over
    gloo they cost a whole one."""
    gradient_width: int = 4
    """Bytes of a gradient's element on its way."""


OURS = Software()
ON_CPU = Software(block_seconds=0.0, in_parts=False)
"""A CPU starts nothing ahead."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Everything that an estimate depends on."""

    facts: Facts
    global_batch_size: int
    micro_batch_size: int
    layout: ParallelConfig
    ranks: int
    node_ranks: int
    """Ranks of a node, whose links are the fast ones."""
    precision: Precision
    hardware: Hardware
    software: Software = OURS
    matrix_precision: str | None = None
    """Of matrix products, where it is another than the weights'."""
    accelerator: bool = True
    """Whether it is not a CPU."""
    packed: bool = True

    @property
    def model(self) -> ModelConfig:
        return self.facts.model

    @property
    def vocabulary_size(self) -> int:
        return self.facts.vocabulary_size

    @property
    def sequence_length(self) -> int:
        return self.facts.sequence_length

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return WIDTHS[self.precision]

    @property
    def outputs(self) -> float:
        """What a tensor rank predicts for a token: classes, or its part of the vocabulary."""
        return self.model.classes.number or self.vocabulary_size / self.layout.tensor

    @cached_property
    def data(self) -> int:
        """Ranks that read different samples."""
        layout = self.layout
        return self.ranks // (layout.tensor * layout.pipeline * layout.context)

    @cached_property
    def micro_batches(self) -> int:
        """Of one rank in a step; a global batch that does not divide is filled."""
        return -(-self.global_batch_size // (self.micro_batch_size * self.data))

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch_size * self.sequence_length

    @cached_property
    def micro_batch(self) -> MicroBatch:
        layout = self.layout
        return MicroBatch(
            samples=self.micro_batch_size,
            sequence=self.sequence_length // layout.context,
            tensor=layout.tensor,
            context=layout.context,
            sequence_parallel=layout.tensor > 1 and layout.sequence_parallel is not False,
            width=self.width,
            packed=self.packed,
            logit_rows=self._logit_rows,
        )

    @property
    def _logit_rows(self) -> int | None:
        if self.layout.logits is Logits.whole or self.model.classes.number:
            return None
        return logit_rows(self.vocabulary_size // self.layout.tensor, "cuda" if self.accelerator else "cpu")
