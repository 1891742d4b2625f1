"""Samples from the live model: greedy or drawn, one full forward a token, nothing cached.

It is for a look at what a model has learnt, at training's own sequence length; it costs O(n^2) forwards' worth of
tokens, and decoding in earnest belongs to a library that caches.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from launcher.assemble import make_engine, vocabulary_size
from launcher.objective import objective_of
from launcher.outcome import Outcome
from launcher.runtime import in_ranks
from launcher.verbs.generate import GenerateJob, facts, keep, show
from launcher.work import Ranks
from model import families
from model.config import ObjectiveName
from parallel.checkpoint.load import load
from parallel.config import ParallelConfig
from parallel.topology import Topology

Forward = Callable[[Tensor], Tensor]
"""Token ids [length] to the logits [vocabulary] of the token that follows."""


@torch.no_grad()
def continue_tokens(
    forward: Forward,
    tokens: Sequence[int],
    *,
    new: int,
    window: int,
    temperature: float,
    end_of_document: int,
    generator: torch.Generator,
) -> list[int]:
    """The tokens that follow, up to `new` of them or the end of the document, which is left out.

    The model sees the last `window` tokens. Temperature 0 takes the likeliest token.
    """
    seen = list(tokens)
    for _ in range(new):
        logits = forward(torch.tensor(seen[-window:])).float().cpu()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))
        if token == end_of_document:
            break
        seen.append(token)
    return seen[len(tokens) :]


def work(job: GenerateJob) -> int:
    """Loads the checkpoint on this one rank, prints the continuations; returns the exit code."""
    return in_ranks(lambda ranks: _generated(job, ranks), job.ranks)


def _generated(job: GenerateJob, ranks: Ranks) -> Outcome:
    config = replace(job.checkpoint.config(), parallel=ParallelConfig())
    store = Store.open(Path(config.data.store))
    tokenizer = Tokenizer.load(store.tokenizer)
    topology = Topology.create(config.parallel)
    engine = make_engine(
        config,
        vocabulary_size=vocabulary_size(config, store),
        topology=topology,
        objective=objective_of(config),
    )
    load(job.checkpoint.path, {"model": engine.participants()["model"]})
    model = engine.updater.module
    model.eval()
    reads_whole = families.objective(config.model, config.train.objective) == ObjectiveName.prefix_lm

    def forward(tokens: Tensor) -> Tensor:
        batch = {
            "tokens": tokens[None],
            "positions": torch.arange(len(tokens))[None],
            "document_ids": torch.zeros(1, len(tokens), dtype=torch.int32),
        }
        if reads_whole:
            batch["prefix"] = torch.ones_like(batch["tokens"], dtype=torch.bool)
        return model(0, batch)[-1, 0]

    samples = []
    for prompt in job.prompts:
        new = continue_tokens(
            forward,
            [tokenizer.end_of_document, *tokenizer.encode_batch([prompt])[0]],
            new=job.tokens,
            window=config.train.sequence_length,
            temperature=job.temperature,
            end_of_document=tokenizer.end_of_document,
            generator=torch.Generator().manual_seed(job.seed),
        )
        samples.append({**facts(job), "prompt": prompt, "continuation": tokenizer.decode(new)})
    show(samples)
    keep(job, samples)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"{len(samples)} texts continued")
