"""The errors that a user causes, and can mend.

Contract: whoever raises a `UserError` has written one plain sentence that names what was wrong and what would be
right; the command line prints it without a stack trace and exits with code 2. Everything else is our own mistake and
keeps its stack trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class UserError(Exception):
    """Something that the user can put right: a missing file, an empty corpus, a full disk."""


class SystemFailure(UserError):
    """The operating system refused: a full disk, a file server that is away. Later it may not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong in a configuration."""

    key: str
    """The dotted key, `parallel.tensor`."""
    got: object
    """The value that stands there."""
    legal: str
    """What would be legal, as a phrase that follows "expected": "a divisor of model.heads = 8"."""

    def __str__(self) -> str:
        return f"{self.key} is {self.got!r}: expected {self.legal}"


class ConfigError(UserError, ValueError):
    """All that is wrong in a configuration, reported at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[Problem, ...]]]:
        """An exception is copied from its message, which is not what this one is made of."""
        return type(self), (self.problems,)
