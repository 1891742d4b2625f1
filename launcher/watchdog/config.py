"""When a rank counts as hung, and as slow. Imports without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """What is watched while the run goes on. A collective operation gives up after 600 s by itself: stay below it."""

    limit_seconds: float | None = 300.0
    """A rank that stays so long in one phase of a step hangs: stacks are dumped, the culprit is named, the job ends to
    be requeued. null watches nothing, for a debugger."""
    long_limit_seconds: float = 540.0
    """The same for what is long by nature: the start, the first step of an attempt, a save, an evaluation."""
    preflight: bool = True
    """Whether the nodes are looked at before the first step: arithmetic, clocks, room, speed, versions. One that is bad
    ends the attempt, and a job goes on without it."""
    straggler_steps: int = 50
    """Steps between two looks at who waits for whom."""
    straggler_seconds: float = 20.0
    """A look spans this time at least; shorter ones are added up."""
    straggler_share: float = 0.1
    """A rank is behind if all others wait for it by this share of the time more than for the median of the others."""
    straggler_looks: int = 5
    """A rank that is behind in so many looks in a row is named; the run goes on."""
    straggler_quiet_seconds: float = 600.0
    """Least time between two lines about the same rank."""
