"""What an encoder puts in place of `[MASK]`."""

from collections.abc import Callable
from typing import Any, Self

import torch

from data_pipeline.marks import of_tokenizer
from data_pipeline.tokenizer import Tokenizer
from launcher.config import RunConfig
from launcher.conversion.export import around
from launcher.conversion.in_memory import with_tokenizer
from launcher.generation.writer import MASK
from launcher.places import Checkpoint
from parallel.common.errors import UserError

Candidates = list[tuple[str, float]]
"""Texts of tokens and their probabilities, the likeliest first."""


class Filler:
    """A model that fills gaps."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, model: Any, *, alive: Callable[[], object] = lambda: None
    ) -> None:
        """Of a run, whose weights `model` of `transformers` has; `alive` is called after every text."""
        self._alive = alive
        self.tokenizer = tokenizer
        self.model = model
        self.window = config.model.positions or config.train.sequence_length
        self.mask = of_tokenizer(self.tokenizer).mask
        self._before, self._behind = around(self.tokenizer, config)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Of a checkpoint; raises as `with_tokenizer` does."""
        return cls(*with_tokenizer(checkpoint, "filling gaps"))

    def read(self, text: str) -> list[int]:
        """The ids of a text with its gaps.

        Raises:
            UserError: it has no gap, or is longer than the model's positions.
        """
        first, *others = self.tokenizer.encode_batch(text.split(MASK))
        if not others:
            raise UserError(f"the prompt {text!r} has no {MASK}: expected one where a token is to be filled in.")
        ids = [*self._before, *first]
        for part in others:
            ids += [self.mask, *part]
        if len(ids) >= self.window:
            raise UserError(f"the prompt {text!r} has {len(ids)} tokens: expected fewer than {self.window}.")
        return [*ids, *self._behind]

    def fill(self, text: str, count: int = 5) -> tuple[str, list[Candidates]]:
        """The text with the likeliest tokens, and for each gap the likeliest ones."""
        ids = torch.tensor(self.read(text))
        with torch.no_grad():
            found = self.model(ids[None].to(self.model.device))
        logits = (found.logits if hasattr(found, "logits") else found.prediction_logits)[0].float().cpu()
        candidates = []
        for place in (ids == self.mask).nonzero().flatten().tolist():
            best = logits[place].softmax(dim=-1).topk(count)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            candidates.append([(self.tokenizer.decode([token]), probability) for token, probability in pairs])
        pieces = iter([each[0][0] for each in candidates])
        first, *others = text.split(MASK)
        self._alive()
        return first + "".join(next(pieces) + part for part in others), candidates
