"""The proof of one layout: what it computes against what one rank computes, parameter by parameter.

Three runs, each on the same weights and batches as its oracle, which is one rank without any parallel dimension, of
plain PyTorch (stage 0):

- float64 without ZeRO: everything that is not ZeRO, to 1e-11;
- float32 with the configured ZeRO stage, to 2e-6;
- the configured precision, if it is bf16 (or auto, which is bf16 on an accelerator), fp16 or fp8: gradients may be 1.5
  times as far from float32 as one rank's are in that precision.

The oracle is led by the layout's gradients (launcher/verify/measure.py), so all steps are compared at the same weights.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from launcher.verify.compare import Tensors, Whole, errors, norm, relative, whole
from launcher.verify.measure import Case, Found, found
from launcher.verify.shrink import STEPS, Shrunk
from launcher.verify.world import RankDied, WorldTimeout, run_world
from parallel.config import ParallelConfig, Precision
from parallel.rules import FIRST_MOMENT, SECOND_MOMENT
from parallel.updater import Kind

_LIMITS = {torch.float64: 1e-11, torch.float32: 2e-6}
_HALVES = {
    Precision.auto: torch.bfloat16,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp8: torch.bfloat16,
}
_HALF_FACTOR = 1.5
"""How much further from float32 than one rank a layout may be in bf16 or fp16."""
_HALF_LOSS, _HALF_NORM = 1e-3, 1e-2
"""Relative errors of a loss and of a norm that bf16 and fp16 may have in any case."""
_MASTERS_LIMIT = 2e-6
"""Masters and moments are float32 in bf16 and fp16 training; fed the same gradients, they are as exact."""
_KINDS = {Kind.weight.value: "weights", FIRST_MOMENT: "first moments", SECOND_MOMENT: "second moments"}
"""What people call the kinds; others are called by their own names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One quantity of a layout, held against one rank's."""

    what: str
    compared: int
    """Parameters, or numbers of the run."""
    worst: str | None
    """The parameter with the largest error."""
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Everything that one run of a layout and its oracle showed; what a diagnosis works on."""

    case: Case
    checks: tuple[Check, ...]
    crash: str | None = None
    """Why there is nothing to compare: a rank raised, died or was stuck."""
    gradients: Sequence[Whole] = ()
    """Of each step."""
    reference: Sequence[Tensors] = ()
    norms: Sequence[float] = ()
    """Global gradient norms that the layout reported, of each step."""
    places: Sequence[Mapping[str, int]] = ()
    """Each rank's coordinate in each dimension."""
    held: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Bytes by kind that the fullest rank holds before an update, and that one rank alone would hold."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.crash is None and all(check.passed for check in self.checks)

    @property
    def failing(self) -> set[str]:
        """The quantities that are wrong."""
        return {check.what for check in self.checks if not check.passed}

    def wrong(self, step: int = 0) -> dict[str, float]:
        """The gradients of a step that are beyond the limit, and their errors."""
        limit = next(check.limit for check in self.checks if check.what == GRADIENTS)
        found = errors(self.gradients[step].tensors, self.reference[step])
        return {name: error for name, error in found.items() if error > limit}


GRADIENTS = "gradients"
NORM = "gradient norm"
LOSS = "loss"
COPIES = "copies on ranks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """One run of one layout, and whether it equals one rank."""

    name: str
    """Precision and ZeRO stage."""
    comparison: Comparison

    @property
    def passed(self) -> bool:
        return self.comparison.passed


def proofs(shrunk: Shrunk) -> Iterator[Proof]:
    """All proofs of a layout, each when it is done; worlds are forked from this process, which has no process group."""
    config, ranks = shrunk.config, shrunk.ranks
    stage = config.parallel.zero_stage
    without_zero = replace(config, parallel=replace(config.parallel, zero_stage=0, offload=False))
    yield Proof(name="float64", comparison=compared(Case(config=without_zero, ranks=ranks, dtype=torch.float64)))
    yield Proof(name=f"fp32 ZeRO-{stage}", comparison=compared(Case(config=config, ranks=ranks)))
    half = _HALVES.get(config.precision)
    if half is not None:
        name = Precision.bf16 if config.precision is Precision.auto else config.precision
        yield Proof(name=f"{name} ZeRO-{stage}", comparison=compared(Case(config=config, ranks=ranks, dtype=half)))


def one_rank(case: Case) -> Case:
    """The oracle of a case: one process, no parallel dimension, no ZeRO."""
    return replace(case, config=replace(case.config, parallel=ParallelConfig(zero_stage=0)), ranks=1)


def compared(case: Case, *, steps: int = STEPS, seconds: float = 60) -> Comparison:
    """Runs a case and its oracle; `seconds`, and as many again for every six ranks, is how long a world may take."""
    started = time.monotonic()
    oracle = one_rank(case)
    oracles = [oracle, replace(oracle, dtype=torch.float32)] if case.dtype in _HALVES.values() else [oracle]
    who = ""
    try:
        per_rank = run_world(lambda: found(case, steps=steps), case.ranks, seconds=seconds * (1 + case.ranks / 6))
        gradients = [whole([rank.gradients[step] for rank in per_rank]) for step in range(steps)]
        led_by = [step.tensors for step in gradients]
        who = "one rank alone: "
        found_by = run_world(lambda: [found(each, steps=steps, led_by=led_by) for each in oracles], 1, seconds=seconds)[
            0
        ]
    except Exception as error:
        return Comparison(case=case, checks=(), crash=who + _crash(error), seconds=time.monotonic() - started)
    ours = _Side.of(per_rank, gradients)
    references = [_Side.of([each], [whole([step]) for step in each.gradients]) for each in found_by]
    checks = _exact(ours, references[0], _LIMITS[case.dtype]) if len(oracles) == 1 else _rounded(ours, *references)
    return Comparison(
        case=case,
        checks=(*checks, _copies(gradients, ours)),
        gradients=gradients,
        reference=[step.tensors for step in references[-1].gradients],
        norms=ours.ranks[0].norms,
        places=[rank.place for rank in per_rank],
        held={kind: (max(rank.held[kind] for rank in per_rank), alone) for kind, alone in found_by[0].held.items()},
        seconds=time.monotonic() - started,
    )


def _crash(error: Exception) -> str:
    """What a rank raised, and where; the stack of it and of ranks that were stuck below."""
    if isinstance(error, RankDied | WorldTimeout):
        return str(error)
    stack = "\n".join(getattr(error, "__notes__", ()))
    rank = re.search(r"on rank (\d+)", stack)
    places = re.findall(r'File "[^"]*?([^/"]+/[^/"]+)", line (\d+)', stack)
    where = f" (rank {rank[1]}, {places[-1][0]}:{places[-1][1]})" if rank and places else ""
    return f"{type(error).__name__}: {error}{where}\n{stack}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """The layout, or its oracle."""

    ranks: Sequence[Found]
    gradients: Sequence[Whole]
    state: Mapping[str, Whole]

    @classmethod
    def of(cls, ranks: Sequence[Found], gradients: Sequence[Whole]) -> "_Side":
        kinds = dict.fromkeys(kind for rank in ranks for kind in rank.state)
        state = {kind: whole([rank.state.get(kind, []) for rank in ranks]) for kind in kinds}
        return cls(ranks=ranks, gradients=gradients, state=state)

    def numbers(self, what: str) -> list[list[float]]:
        """Each rank's numbers, which are to be the same."""
        if what == NORM:
            return [rank.norms for rank in self.ranks]
        return [rank.losses if what == LOSS else [rank.evaluated] for rank in self.ranks]

    def expected(self, what: str) -> list[float]:
        """An oracle's numbers; a led one reports the norms of other gradients, so its own are computed here."""
        return [norm(step.tensors) for step in self.gradients] if what == NORM else self.numbers(what)[0]


_NUMBERS = (LOSS, "evaluation loss", NORM)


def _exact(ours: _Side, reference: _Side, limit: float) -> list[Check]:
    """Every quantity within one limit."""
    error, name = _worst_gradient(ours, reference)
    checks = [
        *(_number(what, ours, reference, limit) for what in _NUMBERS[:2]),
        Check(what=GRADIENTS, compared=_count(ours), worst=name, error=error, limit=limit),
        _number(NORM, ours, reference, limit),
    ]
    return [*checks, *_stepped(ours, reference, limit)]


def _rounded(ours: _Side, own: _Side, exact: _Side) -> list[Check]:
    """Against float32, with what one rank's own roundings lose as the measure; masters against one rank's."""
    error, name = _worst_gradient(ours, exact)
    limit = _HALF_FACTOR * _worst_gradient(own, exact)[0]
    floors = {LOSS: _HALF_LOSS, "evaluation loss": _HALF_LOSS, NORM: _HALF_NORM}
    numbers = {
        what: _number(what, ours, exact, max(_HALF_FACTOR * _apart(own, exact, what), floors[what]))
        for what in _NUMBERS
    }
    checks = [
        numbers[LOSS],
        numbers["evaluation loss"],
        Check(what=GRADIENTS, compared=_count(ours), worst=name, error=error, limit=limit),
        numbers[NORM],
    ]
    return [*checks, *_stepped(ours, own, _MASTERS_LIMIT)]


def _count(side: _Side) -> int:
    return len(side.gradients[0].tensors)


def _number(what: str, ours: _Side, reference: _Side, limit: float) -> Check:
    """The largest error over ranks and steps."""
    expected = reference.expected(what)
    found = [relative(*pair) for rank in ours.numbers(what) for pair in zip(rank, expected, strict=True)]
    return Check(what=what, compared=len(expected), worst=None, error=max(found), limit=limit)


def _apart(own: _Side, exact: _Side, what: str) -> float:
    """How far two oracles' numbers lie apart."""
    return max(relative(*pair) for pair in zip(own.expected(what), exact.expected(what), strict=True))


def _worst_gradient(ours: _Side, reference: _Side) -> tuple[float, str]:
    return max(
        (error, name)
        for step, expected in zip(ours.gradients, reference.gradients, strict=True)
        for name, error in errors(step.tensors, expected.tensors).items()
    )


def _stepped(ours: _Side, reference: _Side, limit: float) -> list[Check]:
    """Weights and moments after the last step, both sides fed the same gradients."""
    checks = []
    for kind in reference.state:
        what = _KINDS.get(kind, kind)
        found = errors(ours.state[kind].tensors, reference.state[kind].tensors)
        name = max(found, key=lambda each: found[each])
        checks.append(Check(what=what, compared=len(found), worst=name, error=found[name], limit=limit))
    return checks


def _copies(gradients: Sequence[Whole], ours: _Side) -> Check:
    """What several ranks hold copies of is the same on all of them, to the last bit."""
    differ: dict[str, float] = {}
    for side in (*gradients, *ours.state.values()):
        for name, spread in side.spreads().items():
            differ[name] = max(differ.get(name, 0.0), spread)
    worst = max(differ, key=lambda name: differ[name], default=None)
    error = differ[worst] if worst is not None else 0.0
    return Check(what=COPIES, compared=_count(ours), worst=worst, error=error, limit=0.0)
