"""Continuations by the live model at each evaluation: what a curve does not show.

All ranks run the same forward passes, because their weights may be sharded over each other (tensor, expert, ZeRO-3);
the first writes. Greedy, so that two evaluations differ by the weights alone; one forward pass of all prompts a token,
nothing cached: decoding in earnest is `bloomery generate`'s, also for layouts that are refused here (pipelines, context
parallelism).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from launcher.config import RunConfig
from launcher.progress import Every
from launcher.run_directory import RunDirectory
from parallel.engine import Engine


class Samples:
    """Some prompts, continued now and then."""

    def __init__(
        self,
        config: RunConfig,
        *,
        store: Store,
        directory: RunDirectory,
        total_steps: int,
        event: Callable[..., None],
    ) -> None:
        """`event` writes an event of the run: `samples`, with the rows."""
        every = config.evaluate.every_steps if config.evaluate.prompts else None
        self._schedule = Every(every, besides=() if every is None else (total_steps,))
        self._directory = directory
        self._prompts: Sequence[str] = config.evaluate.prompts
        self._tokens = config.evaluate.sample_tokens
        self._window = config.train.sequence_length
        self._event = event
        self._tokenizer = Tokenizer.load(store.tokenizer) if self._prompts else None

    def due(self, step: int) -> bool:
        """Whether to continue them after this step."""
        return self._schedule.due(step)

    def take(self, engine: Engine, step: int) -> dict[str, Any]:
        """Continues each prompt; all ranks call this together."""
        tokenizer = self._tokenizer
        assert tokenizer is not None
        begun = [[tokenizer.end_of_document, *ids] for ids in tokenizer.encode_batch(list(self._prompts))]
        engine.updater.module.train(False)
        added = continued(engine, begun, tokens=self._tokens, window=self._window)
        engine.updater.module.train(True)
        ends = [row.index(tokenizer.end_of_document) if tokenizer.end_of_document in row else None for row in added]
        texts = [tokenizer.decode(row[:end]) for row, end in zip(added, ends, strict=True)]
        rows = [{"prompt": prompt, "continuation": text} for prompt, text in zip(self._prompts, texts, strict=True)]
        if engine.topology.rank == 0:
            for row in rows:
                self._directory.samples.append({"checkpoint": f"step {step}", "temperature": 0.0, **row})
        self._event("samples", step=step, rows=rows)
        return {}


@torch.no_grad()
def continued(engine: Engine, begun: Sequence[Sequence[int]], *, tokens: int, window: int) -> list[list[int]]:
    """The `tokens` likeliest tokens behind each row of ids, of which the model sees the last `window`."""
    rows = [list(row) for row in begun]
    for _ in range(tokens):
        seen = [row[-window:] for row in rows]
        for row, token in zip(rows, _next(engine, seen), strict=True):
            row.append(token)
    return [row[len(before) :] for row, before in zip(rows, begun, strict=True)]


def _next(engine: Engine, rows: Sequence[Sequence[int]]) -> list[int]:
    """The likeliest token behind each row, on every rank; rows are filled up behind their ends, where nobody looks."""
    topology = engine.topology
    tensor = topology.config.tensor
    length = -(-max(map(len, rows)) // tensor) * tensor  # what tensor ranks can share
    batch = {
        "tokens": torch.tensor([[*row, *[0] * (length - len(row))] for row in rows]),
        "positions": torch.arange(length).expand(len(rows), -1),
        "document_ids": torch.zeros(len(rows), length, dtype=torch.int32),
    }
    logits: Tensor = engine.updater.module(0, batch)  # [length, rows, vocabulary / tensor]
    last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
    own = logits[last, torch.arange(len(rows), device=logits.device)].contiguous()
    shares = [torch.empty_like(own) for _ in range(tensor)]
    dist.all_gather(shares, own, group=topology.groups.tp)
    return torch.cat(shares, dim=-1).argmax(dim=-1).tolist()
