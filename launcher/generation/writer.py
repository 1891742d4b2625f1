"""Texts from a checkpoint, through `transformers`' `generate`.

A causal model reads the end of a document and then the prompt, as every document begins in training; an imported one
what its own tokenizer puts before a text. A T5 reads the prompt with its end and tells what its decoder says. Several
prompts are decoded together, padded on the left.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from itertools import batched
from pathlib import Path
from typing import Any, Self

import tokenizers
import torch
from torch import Tensor

from data_pipeline.examples.chat import render
from data_pipeline.examples.encode import Encoder, Refused
from data_pipeline.examples.kinds import CHAT_TEMPLATE, Facts, Kind
from data_pipeline.marks import of_tokenizer
from data_pipeline.tokenizer import Tokenizer
from launcher.config import RunConfig
from launcher.conversion.check import transformers
from launcher.conversion.export import beginning
from launcher.conversion.in_memory import with_tokenizer
from launcher.generation.options import Options
from launcher.places import Checkpoint
from model import families
from model.config import Position
from parallel.common.errors import UserError

MASK = "[MASK]"
"""In a prompt: what a masked model fills in, or where a T5 is to tell a span."""
TOGETHER = 8
"""Prompts decoded at a time."""


class Writer:
    """A model that continues texts."""

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, model: Any, *, alive: Callable[[], object] = lambda: None
    ) -> None:
        """Of a run, whose weights `model` of `transformers` has; `alive` is called after every `TOGETHER` prompts."""
        self.tokenizer = tokenizer
        self._first = beginning(tokenizer, config)
        self._alive = alive
        self.model = model
        self.two_stacks = families.family(config.model).architecture is families.Architecture.encoder_decoder
        self.window = config.model.positions or config.train.sequence_length
        self._bounded = config.model.position is Position.learned
        facts = Facts.read(Path(config.data.store))
        self.chat_template = CHAT_TEMPLATE if facts is None else facts.chat_template or CHAT_TEMPLATE
        self._turns: Encoder | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Of a checkpoint; raises as `with_tokenizer` does."""
        return cls(*with_tokenizer(checkpoint, "generating"))

    def read(self, prompt: str) -> list[int]:
        """What the model reads of a prompt."""
        ids = self.tokenizer.encode_batch([prompt])[0]
        if not self.two_stacks:
            return [self._first, *ids]
        parts = self.tokenizer.encode_batch(prompt.split(MASK))
        ids = list(parts[0])
        for part, sentinel in zip(parts[1:], self._sentinels(len(parts) - 1), strict=True):
            ids += [sentinel, *part]
        return [*ids, self.tokenizer.end_of_document]

    def _sentinels(self, count: int) -> list[int]:
        if not count:
            return []
        known = of_tokenizer(self.tokenizer).sentinels.tolist()
        if count > len(known):
            raise UserError(
                f"the prompt has {count} x {MASK}: expected at most {len(known)}, the marks of the tokenizer."
            )
        return known[:count]

    def read_turns(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """What the model reads of a conversation that the assistant is to go on with."""
        if self._turns is None:
            facts = Facts(kind=Kind.answers, chat_template=self.chat_template)
            self._turns = Encoder(self.tokenizer, facts)
        try:
            ids = self._turns.prompt(list(messages))
        except Refused as reason:
            raise UserError(f"the conversation cannot be read: {reason}.") from None
        end = self.tokenizer.end_of_document
        return [*ids, end] if self.two_stacks else [end, *ids]

    def _ends_of_turns(self) -> set[int]:
        """Special tokens that the chat template puts behind what the assistant says."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        end = self.tokenizer.token(self.tokenizer.end_of_document)
        named = {"bos_token": end, "eos_token": end}
        behind = render(self.chat_template, turns, named).rpartition("b")[2]
        return {*self.tokenizer.encode_marked(behind)[0]} & self.tokenizer.special_ids()

    def refuse(self, options: Options) -> None:
        """What this model cannot do.

        Raises:
            UserError: it says why.
        """
        if self._bounded and options.tokens >= self.window:
            raise UserError(
                f"--tokens is {options.tokens}: expected fewer than the {self.window} positions of the model."
            )

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        options: Options,
        *,
        chat: bool = False,
        streamer: Any = None,
    ) -> list[str]:
        """What follows each prompt, up to the end of the document, of the turn, or before a text of `options.stop`.

        Args:
            prompts: ids, as `read` and `read_turns` give them.
            options: how to decode.
            chat: whether the end of a turn ends it.
            streamer: told every token, where there is one prompt and one beam.
        """
        self.refuse(options)
        ends = {self.tokenizer.end_of_document, *(self._ends_of_turns() if chat else ())}
        torch.manual_seed(options.seed)
        found: list[str] = []
        for portion in batched(prompts, TOGETHER):
            rows = self._generated([list(ids) for ids in portion], options, sorted(ends), streamer)
            found += [self._text(row, ends, options.stop) for row in rows]
            self._alive()
        return found

    def _generated(
        self, prompts: Sequence[Sequence[int]], options: Options, ends: list[int], streamer: Any
    ) -> list[list[int]]:
        room = max(self.window - (0 if self.two_stacks else options.tokens), 1 if self._bounded else self.window // 2)
        tokens, mask = self.padded([ids[-room:] for ids in prompts])
        drawn = options.temperature > 0
        draw = {"temperature": options.temperature, "top_k": options.top_k or 0, "top_p": options.top_p or 1.0}
        beams = {"length_penalty": options.length_penalty, "early_stopping": True} if options.beams > 1 else {}
        stops = {"stop_strings": list(options.stop), "tokenizer": self._theirs()} if options.stop else {}
        begin = {"decoder_start_token_id": self.tokenizer.padding} if self.two_stacks else {}
        with torch.no_grad():
            rows = self.model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=options.tokens,
                do_sample=drawn,
                num_beams=options.beams,
                no_repeat_ngram_size=options.no_repeat_ngram,
                eos_token_id=ends,
                pad_token_id=self.tokenizer.padding,
                streamer=streamer,
                **(draw if drawn else {}),
                **beams,
                **stops,
                **begin,
            )
        first = 1 if self.two_stacks else tokens.shape[1]
        return rows[:, first:].tolist()

    def fill(self, prompts: Sequence[str], options: Options) -> list[list[str]]:
        """What a T5 tells for each `[MASK]` of each prompt; nothing where it does not say the mark of one."""
        ends, marks = [self.tokenizer.end_of_document], of_tokenizer(self.tokenizer).sentinels.tolist()
        torch.manual_seed(options.seed)
        found: list[list[str]] = []
        for portion in batched(prompts, TOGETHER):
            rows = self._generated([self.read(prompt) for prompt in portion], options, ends, None)
            for prompt, row in zip(portion, rows, strict=True):
                told = _between(row, marks[: prompt.count(MASK)], {*ends, self.tokenizer.padding})
                found.append([self.tokenizer.decode(ids) for ids in told])
            self._alive()
        return found

    def padded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows of one length and which of their tokens count, [rows, longest]; an encoder's are filled on the right."""
        longest = max(len(ids) for ids in rows)
        tokens = torch.full((len(rows), longest), self.tokenizer.padding)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(rows):
            place = slice(0, len(ids)) if self.two_stacks else slice(longest - len(ids), longest)
            tokens[row, place], mask[row, place] = torch.tensor(ids), 1
        return tokens.to(self.model.device), mask.to(self.model.device)

    def _theirs(self) -> Any:
        """The tokenizer as `transformers` wants it, which looks for stops in its vocabulary."""
        backend = tokenizers.Tokenizer.from_str(self.tokenizer.to_json())
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)

    def _text(self, ids: Sequence[int], ends: set[int], stop: Sequence[str]) -> str:
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text = self.tokenizer.decode([token for token in ids[:length] if token != self.tokenizer.padding])
        return text[: min((place for each in stop if (place := text.find(each)) >= 0), default=len(text))]


def _between(row: Sequence[int], marks: Sequence[int], ends: Set[int]) -> list[list[int]]:
    """What stands behind each mark, up to the next one or to an end."""
    found: dict[int, list[int]] = {mark: [] for mark in marks}
    current: list[int] = []
    for token in row:
        if token in ends:
            break
        if token in found:
            current = found[token]
        else:
            current.append(token)
    return [found[mark] for mark in marks]
