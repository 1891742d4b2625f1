"""Configuration of what is covered or cut out of samples, and the lengths that follow. Imports without torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.common.errors import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskingConfig:
    """Which tokens are covered, for masked language modelling."""

    share: float = 0.15
    """Share of the tokens that are predicted."""
    whole_words: bool = False
    """All tokens of a word are covered together."""
    covered: float = 0.8
    """Share of the predicted tokens that are replaced by the mark."""
    exchanged: float = 0.1
    """Share of them that are replaced by a random token; what remains of 1 stays as it is."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the values."""
        if not 0 < self.share < 1:
            yield Problem(key="data.masking.share", got=self.share, legal="a number between 0 and 1")
        for key, share in (("covered", self.covered), ("exchanged", self.exchanged)):
            if not 0 <= share <= 1 or self.covered + self.exchanged > 1:
                legal = "a share of 0 or more; covered and exchanged are 1 at most together"
                yield Problem(key=f"data.masking.{key}", got=share, legal=legal)


TARGET_UNIT = 64
"""A decoder's rows are a multiple of it, so that any usual layout can cut them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpansConfig:
    """Which spans are cut out, for span corruption."""

    share: float = 0.15
    """Share of the tokens that are cut out."""
    mean_length: float = 3.0
    """Tokens of a span on average."""

    def cut(self, tokens: int) -> tuple[int, int]:
        """Tokens that are cut out of so many, and in how many spans; of fewer than two tokens none are."""
        if tokens < 2:
            return 0, 0
        noise = min(max(round(tokens * self.share), 1), tokens - 1)
        return noise, min(max(round(noise / self.mean_length), 1), noise, tokens - noise)

    def source_length(self, sequence_length: int) -> int:
        """How many tokens of a document leave so many when spans became marks."""
        length = sequence_length
        while True:
            noise, spans = self.cut(length + 1)
            if length + 1 - noise + spans > sequence_length:
                return length
            length += 1

    def target_length(self, sequence_length: int) -> int:
        """Tokens of a decoder's row: the spans of a document with their marks and its beginning, rounded up."""
        noise, spans = self.cut(self.source_length(sequence_length))
        return -(-(noise + spans + 1) // TARGET_UNIT) * TARGET_UNIT

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the values."""
        if not 0 < self.share < 1:
            yield Problem(key="data.spans.share", got=self.share, legal="a number between 0 and 1")
        if not self.mean_length >= 1:
            yield Problem(key="data.spans.mean_length", got=self.mean_length, legal="1 or more")
