"""How a text is decoded. Imports without torch."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What `transformers`' `generate` is asked for."""

    tokens: int = 64
    """New tokens at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn from the softmax of logits / temperature."""
    top_k: int | None = None
    """Draw from so many likeliest tokens."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability (Holtzman et al., 2019, arXiv:1904.09751)."""
    beams: int = 1
    """Hypotheses that are followed; the best one is given."""
    length_penalty: float = 1.0
    """The log-likelihood of a hypothesis is divided by its length to this power; above 1 favours long ones."""
    no_repeat_ngram: int = 0
    """No run of so many tokens comes twice; 0: whatever comes."""
    stop: tuple[str, ...] = ()
    """Texts before which to stop."""
    seed: int = 0
    """Of the draw."""

    def problems(self) -> Iterator[str]:
        """What makes no sense, a sentence each."""
        if not self.temperature >= 0:
            yield f"--temperature is {self.temperature}: expected 0 or more."
        if self.top_k is not None and self.top_k < 1:
            yield f"--top-k is {self.top_k}: expected 1 or more."
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield f"--top-p is {self.top_p}: expected a number above 0, at most 1."
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            yield "--temperature is 0: expected a number above 0 with --top-k or --top-p, which narrow a draw."
        if self.beams < 1:
            yield f"--beams is {self.beams}: expected 1 or more."
        if self.beams == 1 and self.length_penalty != 1:
            yield f"--length-penalty is {self.length_penalty}: expected 1 without --beams above 1."
        if self.no_repeat_ngram < 0:
            yield f"--no-repeat-ngram is {self.no_repeat_ngram}: expected 0 or more."
        if "" in self.stop:
            yield "--stop is empty: expected a text."
