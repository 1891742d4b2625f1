"""What a layout makes of the optimizer's step: what runs, what is sharded, and when gradients are reduced.

One decision, asked by everybody: `parallel.zero` acts on it, `bloomery explain` prints it, `launcher.validate` refuses
what it refuses. So the table that a user reads is the code that runs. Imports without torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from parallel.common.errors import Problem
from parallel.config import ParallelConfig
from parallel.rules import RULES


class Reduction(StrEnum):
    """When gradients are summed over the ranks that hold different tokens."""

    at_the_end = "once, after the last backward pass"
    in_last_backward = "during the last micro-batch's backward pass"
    in_every_backward = "during every micro-batch's backward pass"


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """How a step is taken in one layout."""

    stage: int
    """The ZeRO stage that runs, which is the configured one but for cases that `reason` names."""
    runs: str
    """Whose code takes the step."""
    sharded: tuple[str, ...]
    """What each rank holds only its part of, all the time, micro-batches included."""
    reduction: Reduction
    reason: str
    """Why it is so, one sentence."""
    own: bool = False
    """Whether it is our own ZeRO (`parallel.sharded`)."""
    whole_parameters: bool = False
    """Whether each parameter is stepped whole, by one rank (`parallel.whole`)."""


_SHARDED = {0: (), 1: ("masters", "moments"), 2: ("masters", "moments", "gradients")}
_SHARDED[3] = (*_SHARDED[2], "weights")


def mechanism(layout: ParallelConfig, *, tied: bool, sharers: int, optimizer: str = "adamw") -> Mechanism:
    """What runs in this layout, if it is a legal one.

    Args:
        layout: the parallel degrees and the ZeRO stage.
        tied: whether input and output embedding are one weight.
        sharers: ranks that hold the same part of the model: data x context.
        optimizer: `optimizer.name`.
    """
    rule = RULES[optimizer]
    if not rule.elementwise:
        shared = layout.zero_stage > 0
        who = "the rank that owns it" if shared else "every data-parallel rank"
        return Mechanism(
            stage=min(layout.zero_stage, 1),
            runs=f"{rule.title} on whole parameters",
            sharded=_SHARDED[1] if shared else (),
            reduction=Reduction.at_the_end,
            reason=f"{rule.title} looks at whole matrices, so {who} gets all of a parameter's gradient and steps it",
            whole_parameters=True,
        )
    alone = sharers == 1 and not layout.offload
    if layout.zero_stage == 0 or alone:
        whole = "every rank holds everything; whole gradients are summed by our own all-reduce"
        return Mechanism(
            stage=0,
            runs="torch's AdamW",
            sharded=(),
            reduction=Reduction.at_the_end,
            reason="no other rank holds the same part of the model to share it with" if alone else whole,
        )
    stage, reduction = layout.zero_stage, Reduction.in_every_backward
    if layout.virtual_pipeline > 1:
        stage, reduction = 1, Reduction.at_the_end
        reason = "the backward passes of interleaved chunks have no last one in which all gradients are complete"
    elif layout.pipeline > 1 and tied:
        stage, reduction = 1, Reduction.at_the_end
        reason = "a tied embedding's copies on the first and the last stage are added up before anything is reduced"
        if layout.zero_stage == 2:
            reason += ", so that stage 2 keeps whole gradients and saves what stage 1 saves"
    elif stage == 1:
        reduction = Reduction.in_last_backward
        reason = "whole gradients are summed in fp32 over the micro-batches and leave during the last one"
    else:
        reason = "a gradient is reduced as soon as it is there, and each rank adds up its own part in fp32"
    if stage == 3:
        reason += "; weights are gathered layer by layer"
    own = stage == 1 and not layout.offload
    return Mechanism(
        stage=stage,
        runs=f"{'our own' if own else 'DeepSpeed'} ZeRO stage {stage}",
        sharded=_SHARDED[stage],
        reduction=reduction,
        reason=reason,
        own=own,
    )


def refusals(layout: ParallelConfig, *, experts: int, optimizer: str = "adamw") -> Iterator[Problem]:
    """What cannot work, each with the reason and the nearest layout that does."""
    stage = layout.zero_stage
    if not RULES[optimizer].elementwise:
        title = RULES[optimizer].title
        if stage > 1:
            because = f"stage {stage} cuts parameters anywhere, {title} needs them whole"
            legal = f"0 or 1 with optimizer.name={optimizer}: {because}"
            yield Problem(key="parallel.zero_stage", got=stage, legal=legal)
        if layout.offload:
            legal = f"false with optimizer.name={optimizer}: only ZeRO's AdamW steps on the host"
            yield Problem(key="parallel.offload", got=True, legal=legal)
        return
    if stage == 3 and layout.pipeline > 1:
        legal = "at most 2 with a pipeline: stage 3 would gather weights out of order and hang"
        yield Problem(key="parallel.zero_stage", got=3, legal=legal)
    if stage == 3 and experts:
        legal = "at most 2 with model.moe.experts: stage 3 cannot gather weights that not every rank's tokens use"
        yield Problem(key="parallel.zero_stage", got=3, legal=legal)
    if stage == 2 and layout.virtual_pipeline > 1:
        legal = "1 with virtual_pipeline > 1: interleaved chunks keep whole gradients, stage 2 would save nothing"
        yield Problem(key="parallel.zero_stage", got=2, legal=legal)
    if layout.offload and stage == 0:
        legal = "false at ZeRO stage 0, or parallel.zero_stage 1: it is ZeRO that steps on the host"
        yield Problem(key="parallel.offload", got=True, legal=legal)
