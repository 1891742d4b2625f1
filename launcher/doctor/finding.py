"""One line of the doctor: something is well, or is not and how to mend it. Imports without torch."""

import sys
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Health(StrEnum):
    """What a line is about."""

    ok = "ok"
    note = "note"
    """Works, and could be better or do more."""
    bad = "BAD"
    """Has to be mended before a run."""


_COLOURS = {Health.ok: "32", Health.note: "33", Health.bad: "31;1"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What was looked at, how it is, and what would make it right."""

    about: str
    text: str
    health: Health = Health.ok
    remedy: str = ""

    def line(self, *, colour: bool) -> str:
        """For a person."""
        mark = f"{self.health.value:<5}"
        shown = f"\x1b[{_COLOURS[self.health]}m{mark}\x1b[0m" if colour else mark
        text = " ".join(f"{self.text}: {self.remedy}".split() if self.remedy else self.text.split())
        return f"{shown} {self.about:<13} {text}"

    def record(self) -> dict[str, Any]:
        """For a program."""
        return {**asdict(self), "health": self.health.value.lower()}


def show(finding: Finding) -> None:
    """Prints the line at once: some looks take seconds."""
    print(finding.line(colour=sys.stdout.isatty()), flush=True)
