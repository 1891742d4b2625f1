"""What a run looks at of its own model between two steps; what it finds goes into the record of the step."""

from collections.abc import Sequence
from typing import Any, Protocol

from parallel.engine import Engine


class Look(Protocol):
    """One thing to look at; it leaves the training as it was, to the bit."""

    def due(self, step: int) -> bool:
        """Whether after this step."""
        ...

    def take(self, engine: Engine, step: int) -> dict[str, Any]:
        """What is found, for the record of this step (names stand in `launcher.metrics`); all ranks call this."""
        ...


class Looks:
    """All of them."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self._looks = looks
        self._latest: tuple[int, dict[str, Any]] = (0, {})

    def due(self, step: int) -> bool:
        """Whether anything is."""
        return any(look.due(step) for look in self._looks)

    def take(self, engine: Engine, step: int) -> dict[str, Any]:
        """What those find that are due after this step. All ranks call this together."""
        found: dict[str, Any] = {}
        for look in self._looks:
            if look.due(step):
                found |= look.take(engine, step)
        self._latest = step, found
        return dict(found)

    def at(self, step: int) -> dict[str, float]:
        """The numbers that were found after this step, for its checkpoint; empty if nobody looked then."""
        found = self._latest[1] if step == self._latest[0] else {}
        return {name: value for name, value in found.items() if isinstance(value, float)}
