"""The search: every layout that a model may have on some ranks, judged; the best, and why the others are not.

Nothing about a layout is decided here: `launcher.layout_rules` says what is illegal, `memory` what fits, `seconds` how
long a step takes. Degrees are tried in the divisors that keep cuts even; a depth that does not divide gets a split with
the odd layers in the middle. For each layout and micro-batch the cheapest recomputation that fits is taken, and only
that one is timed. What holds nothing but its state and does not fit is left at once. Imports without torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.config import RunConfig
from launcher.layout_rules import divisors, layout_problems
from launcher.plan.estimate import Estimate, estimate
from launcher.plan.memory import most_bytes, state_bytes
from launcher.plan.setting import Setting
from launcher.plan.stages import balanced_split
from parallel.config import ParallelConfig, Recompute, RecomputeConfig
from parallel.mechanism import refusals

MICRO_BATCHES = (1, 2, 4, 8, 16)
RECOMPUTES = (Recompute.none, Recompute.selective, Recompute.full)
"""Cheapest first."""
_LEAST_CONTEXT_TOKENS = 2048
"""A rank's part of a sequence is not cut finer than that."""
_MOST_CHUNKS = 8
"""Of a rank in an interleaved pipeline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A layout and what became of it."""

    setting: Setting
    refused: str | None = None
    """Why it cannot be, in one sentence."""
    over_bytes: float = 0.0
    """What it needs beyond the memory; 0 where it fits."""
    estimate: Estimate | None = None
    """None where it was refused, or does not fit and nobody asked."""

    @property
    def fits(self) -> bool:
        return self.estimate is not None and self.over_bytes == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the search found."""

    best: Sequence[Judged]
    """Fastest first, each another way to cut the model."""
    asked: Sequence[tuple[str, Judged]]
    """Layouts that a person would ask about, each with what it differs in."""
    tried: int
    """Layouts that were judged."""
    least: Judged | None
    """Where nothing fits: the one that comes closest."""


class Search:
    """All layouts of one run on one machine; `base` has everything but the layout and the micro-batch."""

    def __init__(self, config: RunConfig, base: Setting) -> None:
        self._config = config
        self._base = base
        self._room = base.hardware.memory_bytes - base.hardware.reserved_bytes
        self._tried = 0

    def plan(self, count: int = 5) -> Plan:
        """The best `count` layouts, and those that a person would ask about."""
        fastest: dict[tuple[int, ...], Judged] = {}
        least: Judged | None = None
        for layout in self._layouts():
            for judged in self._with_micro_batches(layout):
                if judged.fits:
                    cut = layout.tensor, layout.pipeline, layout.context, layout.expert, layout.zero_stage
                    if cut not in fastest or _pace(judged) < _pace(fastest[cut]):
                        fastest[cut] = judged
                elif least is None or judged.over_bytes < least.over_bytes:
                    least = judged
        best = sorted(fastest.values(), key=_pace)[:count]
        asked = list(self._asked(best[0])) if best else []
        return Plan(best=best, asked=asked, tried=self._tried, least=None if best else least)

    def judge(self, layout: ParallelConfig, micro_batch: int) -> Judged:
        """One layout, whatever it is."""
        self._tried += 1
        setting = replace(self._base, layout=layout, micro_batch_size=micro_batch)
        problem = self._problem(layout, micro_batch)
        if problem is not None:
            return Judged(setting=setting, refused=problem)
        over = most_bytes(setting) - self._room
        return Judged(setting=setting, over_bytes=max(0.0, over), estimate=estimate(setting))

    def _layouts(self) -> Iterator[ParallelConfig]:
        """Every cut that might do; what the rules refuse is found out later."""
        model, ranks, base = self._config.model, self._base.ranks, self._base
        experts = [1] if not model.moe.experts else divisors(model.moe.experts)
        for tensor in divisors(base.node_ranks):
            if ranks % tensor or (model.kv_heads or model.heads) % tensor:
                continue
            for pipeline in divisors(ranks // tensor):
                if pipeline > model.layers:
                    break
                for context in divisors(ranks // tensor // pipeline):
                    if context > 1 and base.sequence_length // context < _LEAST_CONTEXT_TOKENS:
                        break
                    if context & (context - 1):
                        continue
                    for expert in experts:
                        cut = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context, expert=expert)
                        yield from self._depths(cut)

    def _depths(self, cut: ParallelConfig) -> Iterator[ParallelConfig]:
        layers, experts = self._config.model.layers, self._config.model.moe.experts
        for chunks in range(1, _MOST_CHUNKS + 1):
            whole = cut.pipeline * chunks
            if whole > layers or (chunks > 1 and (cut.pipeline == 1 or (layers % whole and layers // whole > 2))):
                continue
            split = balanced_split(layers, whole)
            for stage in (1, 2, 3):
                layout = replace(cut, virtual_pipeline=chunks, pipeline_split=split, zero_stage=stage)
                if not any(refusals(layout, experts=experts, optimizer=self._config.optimizer.name)):
                    yield layout

    def _with_micro_batches(self, layout: ParallelConfig) -> Iterator[Judged]:
        setting = replace(self._base, layout=layout, micro_batch_size=1)
        samples = self._base.global_batch_size
        sizes = [size for size in MICRO_BATCHES if size * setting.data <= samples]
        if layout.virtual_pipeline > 1:
            sizes = [size for size in sizes if -(-samples // (size * setting.data)) % layout.pipeline == 0]
        if not sizes or self._problem(layout, sizes[0]) is not None:
            return
        state = max(stage["all"] for stage in state_bytes(setting))
        for size in sizes:
            self._tried += 1
            judged = self._cheapest(replace(setting, micro_batch_size=size), hopeless=state > self._room)
            yield judged
            if not judged.fits:
                return

    def _cheapest(self, setting: Setting, *, hopeless: bool) -> Judged:
        """With the cheapest recomputation that fits, else how much is missing with all of it."""
        over = 0.0
        for mode in RECOMPUTES[-1:] if hopeless else RECOMPUTES:
            layout = replace(setting.layout, recompute=RecomputeConfig(mode=mode))
            setting = replace(setting, layout=layout)
            over = max(0.0, most_bytes(setting) - self._room)
            if not over:
                return Judged(setting=setting, estimate=estimate(setting))
        return Judged(setting=setting, over_bytes=over)

    def _problem(self, layout: ParallelConfig, micro_batch: int) -> str | None:
        """The first reason why a layout is illegal."""
        train = replace(self._config.train, micro_batch_size=micro_batch)
        problems = layout_problems(replace(self._config, parallel=layout, train=train), self._base.ranks)
        return next(map(str, problems), None)

    def _asked(self, best: Judged) -> Iterator[tuple[str, Judged]]:
        """The user's own, data parallelism alone, and what differs from the best in one thing."""
        chosen, size = best.setting.layout, best.setting.micro_batch_size
        own = self._config.parallel
        seen = {_key(chosen, size)}
        alone = [(f"data parallel alone, ZeRO-{stage}", ParallelConfig(zero_stage=stage), 1) for stage in (1, 2, 3)]
        configured = ("as configured", own, self._config.train.micro_batch_size)
        for name, layout, micro_batch in (configured, *alone, *self._neighbours(chosen, size)):
            if _key(layout, micro_batch) in seen:
                continue
            seen.add(_key(layout, micro_batch))
            judged = self.judge(layout, micro_batch)
            if judged.over_bytes and name.startswith("data"):  # the one that needs least
                again = replace(layout, recompute=RecomputeConfig(mode=Recompute.full))
                name, judged = f"{name}, full recompute", self.judge(again, micro_batch)
            yield name, judged

    def _neighbours(self, best: ParallelConfig, size: int) -> Iterator[tuple[str, ParallelConfig, int]]:
        for key in ("tensor", "pipeline", "virtual_pipeline", "context", "expert"):
            degree = getattr(best, key)
            if (key == "expert" and not self._config.model.moe.experts) or (
                key == "virtual_pipeline" and best.pipeline == 1
            ):
                continue
            for other in (degree // 2, 2 * degree):
                name, changed = f"{key.replace('_', ' ')} {other}", replace(best, **{key: max(1, other)})
                if changed.pipeline > 1 and changed.zero_stage == 3:
                    name, changed = f"{name}, ZeRO-1", replace(changed, zero_stage=1)
                whole = changed.pipeline * changed.virtual_pipeline
                changed = replace(changed, pipeline_split=balanced_split(self._config.model.layers, whole))
                if other:
                    yield name, changed, size
        for stage in (1, 2, 3):
            yield f"ZeRO-{stage}", replace(best, zero_stage=stage), size
        for other in (size // 2, 2 * size):
            if other:
                yield f"micro-batch {other}", best, other
        for mode in RECOMPUTES:
            yield f"recompute {mode.value}", replace(best, recompute=RecomputeConfig(mode=mode)), size


def _pace(judged: Judged) -> float:
    assert judged.estimate is not None
    return judged.estimate.step_seconds


def _key(layout: ParallelConfig, micro_batch: int) -> tuple[object, ...]:
    split = None if layout.pipeline_split is None else tuple(layout.pipeline_split)
    return (replace(layout, pipeline_split=None).__repr__(), split, micro_batch)
