"""What a person sees of a plan, and the same as plain data. Imports without torch."""

from collections.abc import Iterator
from typing import Any

from launcher.plan.estimate import Estimate
from launcher.plan.search import Judged, Plan
from launcher.plan.setting import Setting
from parallel.common.units import format_bytes, format_count
from parallel.config import ParallelConfig

_SAME = 0.005
"""Steps whose times differ by less are called equally fast."""


def in_words(setting: Setting) -> str:
    """`tensor 4, pipeline 4 x 2, data 8, ZeRO-1`; degrees of 1 are left out."""
    layout = setting.layout
    pipeline = f"{layout.pipeline}" + (f" x {layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else "")
    degrees = {
        "tensor": (layout.tensor, f"{layout.tensor}"),
        "pipeline": (layout.pipeline, pipeline),
        "context": (layout.context, f"{layout.context}"),
        "expert": (layout.expert, f"{layout.expert}"),
        "data": (setting.data, f"{setting.data}"),
    }
    named = [f"{name} {said}" for name, (degree, said) in degrees.items() if degree > 1]
    return ", ".join([*named, f"ZeRO-{layout.zero_stage}"])


def reason(judged: Judged, best: Judged) -> str:
    """Why a layout is not the best, in one sentence."""
    if judged.refused is not None:
        return judged.refused
    estimate, winner = judged.estimate, best.estimate
    if judged.over_bytes:
        room = judged.setting.hardware.memory_bytes - judged.setting.hardware.reserved_bytes
        needed = room + judged.over_bytes
        return f"does not fit by {format_bytes(judged.over_bytes)}: {format_bytes(needed)} of {format_bytes(room)}"
    assert estimate is not None
    assert winner is not None
    slower = estimate.step_seconds / winner.step_seconds - 1
    if abs(slower) < _SAME:
        return "as fast"
    if slower < 0:
        return f"{-slower:.0%} faster; the search does not try it"
    lost = {kind: estimate.seconds[kind] - winner.seconds[kind] for kind in estimate.seconds}
    worst = max(lost, key=lambda kind: lost[kind])
    share = estimate.seconds[worst] / estimate.step_seconds
    instead = f"{estimate.seconds[worst]:.3g} s instead of {winner.seconds[worst]:.3g} s"
    return f"{slower:.0%} slower: {share:.0%} {worst}, {instead}"


def lines(plan: Plan, setting: Setting, tokens: int | None) -> Iterator[str]:
    """The plan as text, line by line."""
    nodes = f"{setting.ranks // setting.node_ranks} x {setting.node_ranks}"
    parameters = setting.facts.parameters
    trained = f", {format_count(parameters[True])} of them trained," if parameters[False] else ""
    machine = f"{nodes} {setting.hardware.name}, {setting.precision.value}"
    yield f"{format_count(sum(parameters.values()))} parameters{trained} on {machine}"
    batch = f"{setting.global_batch_size:,} samples of {setting.sequence_length:,} tokens a step"
    yield f"{batch}; {plan.tried:,} layouts judged"
    yield ""
    if plan.best:
        yield from _table(plan, setting, tokens)
        yield ""
        yield from _detail(plan.best[0])
        yield ""
        yield "and why not"
        width = max(len(name) for name, _ in plan.asked)
        for name, judged in plan.asked:
            yield f"  {name:<{width}}  {reason(judged, plan.best[0])}"


def _table(plan: Plan, setting: Setting, tokens: int | None) -> Iterator[str]:
    found = [(judged.setting, judged.estimate) for judged in plan.best if judged.estimate is not None]
    width = max(len(in_words(one)) for one, _ in found)
    priced = f"{'days':>8}{'cost':>9}" if tokens is not None else ""
    yield (
        f"  {'':<{width}}  {'micro-batch':>11}  {'recompute':<10}{'memory':>10}{'step':>9}{'tokens/s':>10}"
        f"{'MFU causal':>12}{'full':>7}{'bubble':>8}{priced}"
    )
    for number, (one, estimate) in enumerate(found, 1):
        budget = ""
        if tokens is not None:
            days = estimate.days(tokens)
            budget = f"{days:>8.3g}{'$' + format_count(dollars(estimate, setting, tokens)):>9}"
        yield (
            f"{number} {in_words(one):<{width}}  {one.micro_batch_size:>11}  {one.layout.recompute.mode.value:<10}"
            f"{format_bytes(estimate.bytes_total):>10}{estimate.step_seconds:>7.3g} s"
            f"{format_count(estimate.tokens_per_second):>10}{estimate.mfu_causal:>12.1%}{estimate.mfu_full:>7.1%}"
            f"{estimate.seconds['bubble'] / estimate.step_seconds:>8.1%}{budget}"
        )


def _detail(best: Judged) -> Iterator[str]:
    estimate = best.estimate
    assert estimate is not None
    room = best.setting.hardware.memory_bytes - best.setting.hardware.reserved_bytes
    held = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in estimate.bytes.items() if count)
    yield f"1 holds  {held}; {format_bytes(estimate.bytes_total)} of the {format_bytes(room)} that tensors can have"
    spent = ", ".join(
        f"{kind} {seconds:.3g} s ({seconds / estimate.step_seconds:.0%})" for kind, seconds in estimate.seconds.items()
    )
    yield f"1 takes  {spent}"
    if best.setting.layout.pipeline_split is not None:
        yield f"1 needs  parallel.pipeline_split={best.setting.layout.pipeline_split}"


def dollars(estimate: Estimate, setting: Setting, tokens: int) -> float:
    """What so many tokens cost."""
    return estimate.days(tokens) * 24 * setting.ranks * setting.hardware.dollars_per_hour


def overrides(setting: Setting) -> dict[str, Any]:
    """What `bloomery train` has to be told to run the layout: a configuration file's content."""
    layout: ParallelConfig = setting.layout
    parallel: dict[str, Any] = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "pipeline_split": layout.pipeline_split,
        "context": layout.context,
        "expert": layout.expert,
        "zero_stage": layout.zero_stage,
        "recompute": {"mode": layout.recompute.mode.value, "blocks": None},
    }
    return {"train": {"micro_batch_size": setting.micro_batch_size}, "parallel": parallel}


def as_dict(plan: Plan, setting: Setting, tokens: int | None) -> dict[str, Any]:
    """JSON-able."""
    return {
        "hardware": setting.hardware.name,
        "nodes": setting.ranks // setting.node_ranks,
        "gpus_per_node": setting.node_ranks,
        "trained_parameters": setting.facts.parameters[True],
        "frozen_parameters": setting.facts.parameters[False],
        "tried": plan.tried,
        "best": [_judged(judged, tokens) for judged in plan.best],
        "asked": [
            {"name": name, "reason": reason(judged, plan.best[0]), **_judged(judged, tokens)}
            for name, judged in plan.asked
        ],
    }


def _judged(judged: Judged, tokens: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {"layout": in_words(judged.setting), "overrides": overrides(judged.setting)}
    estimate = judged.estimate
    if judged.refused is not None or estimate is None:
        return found | {"refused": judged.refused}
    found |= {
        "over_bytes": judged.over_bytes,
        "bytes": dict(estimate.bytes),
        "seconds": dict(estimate.seconds),
        "step_seconds": estimate.step_seconds,
        "tokens_per_second": estimate.tokens_per_second,
        "mfu_causal": estimate.mfu_causal,
        "mfu_full": estimate.mfu_full,
    }
    if tokens is not None:
        found |= {"days": estimate.days(tokens), "dollars": dollars(estimate, judged.setting, tokens)}
    return found
