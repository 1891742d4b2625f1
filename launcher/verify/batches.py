"""Synthetic batches that make a wrong layout show: the same for every layout, a function of the step alone.

Rows hold one, two and three documents; their borders lie where no cut of the sequence does, so every cut goes through a
document. Rows, steps and so micro-batches and ranks count unequally many tokens. Each of these properties can be taken
away, which tells a diagnosis whether a failure needs it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.config import RunConfig
from launcher.objective import travelling_length
from model import families
from parallel.topology import Topology

_BORDERS = (5 / 16, 11 / 16)
"""Where documents end, as shares of a sequence: 2 x context parts of equal length have no cut there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traits:
    """What makes a batch harder than random tokens in equal rows."""

    packed: bool = True
    """Several documents in some rows."""
    positioned: bool = True
    """Positions count up within a document; otherwise all are zero."""
    unequal: bool = True
    """Rows whose tokens do not all count."""
    silent_slices: int = 0
    """Where above 0: the last token of each of so many equal slices does not count, as its label lies behind a cut."""


def synthetic_batch(config: RunConfig, step: int, traits: Traits) -> dict[str, Tensor]:
    """The global batch of a step (INTERFACES, "A batch"): tensors of [train.global_batch_size, train.sequence_length].

    Token ids lie below model.vocabulary_size, which is given.
    """
    samples, vocabulary = config.train.global_batch_size, config.model.vocabulary_size
    sequence = travelling_length(config) - config.train.sequence_length or config.train.sequence_length
    assert vocabulary is not None
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocabulary, (samples, sequence + 1), generator=generator)
    document_ids = _documents(samples, sequence, traits)
    positions = torch.arange(sequence).repeat(samples, 1)
    if traits.packed:
        first, second = (int(sequence * share) for share in _BORDERS)
        positions[1::2, first:] -= first
        positions[1::4, second:] -= second - first
    weights = torch.ones(samples, sequence)
    if traits.unequal:
        weights[:, : step % 3] = 0
        weights[-1, sequence // 4 :] = 0
    if traits.silent_slices:
        length = sequence // traits.silent_slices
        weights[:, length - 1 :: length] = 0
    form = families.form(config.model, config.train.objective)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_weights": weights,
        "positions": positions if traits.positioned else torch.zeros_like(positions),
        "document_ids": document_ids,
        "sample_ids": torch.arange(samples) + step * samples,
    } | _MORE.get(form, _nothing)(config, traits, generator)


def _documents(samples: int, sequence: int, traits: Traits) -> Tensor:
    """Document ids [samples, sequence]: one, two or three documents in a row."""
    ids = torch.zeros(samples, sequence, dtype=torch.int32)
    if traits.packed:
        first, second = (int(sequence * share) for share in _BORDERS)
        ids[1::2, first:] = 1
        ids[1::4, second:] = 2
    return ids


def _nothing(config: RunConfig, traits: Traits, generator: torch.Generator) -> dict[str, Tensor]:
    return {}


def _encoder(config: RunConfig, traits: Traits, generator: torch.Generator) -> dict[str, Tensor]:
    """What an encoder reads, in as many documents as its decoder's rows have."""
    assert config.model.vocabulary_size is not None
    shape = (config.train.global_batch_size, config.train.sequence_length)
    return {
        "encoder_tokens": torch.randint(0, config.model.vocabulary_size, shape, generator=generator),
        "encoder_document_ids": _documents(*shape, traits),
    }


def _prefix(config: RunConfig, traits: Traits, generator: torch.Generator) -> dict[str, Tensor]:
    """The first quarter, half, or three quarters of each document."""
    ids = _documents(config.train.global_batch_size, config.train.sequence_length, traits)
    prefix = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(ids):
        begin = 0
        for document, length in enumerate(row.unique_consecutive(return_counts=True)[1].tolist()):
            prefix[number, begin : begin + max(1, length * (1 + (number + document) % 3) // 4)] = True
            begin += length
    return {"prefix": prefix}


def _pairs(config: RunConfig, traits: Traits, generator: torch.Generator) -> dict[str, Tensor]:
    """Segments that change anywhere, and answers, one of which does not count."""
    samples, sequence = config.train.global_batch_size, config.train.sequence_length
    weights = torch.ones(samples)
    weights[-1] = 0
    return {
        "segment_ids": torch.randint(0, 2, (samples, sequence), generator=generator),
        "next_sentence": torch.randint(0, 2, (samples,), generator=generator),
        "next_sentence_weights": weights,
    }


def _classes(config: RunConfig, traits: Traits, generator: torch.Generator) -> dict[str, Tensor]:
    """A class for each token."""
    shape = (config.train.global_batch_size, config.train.sequence_length)
    return {"labels": torch.randint(0, config.model.classes.number, shape, generator=generator)}


_MORE: Mapping[str, Callable[[RunConfig, Traits, torch.Generator], dict[str, Tensor]]] = {
    "causal": _nothing,
    "prefix": _prefix,
    "masked": _nothing,
    "pairs": _pairs,
    "spans": _encoder,
    "targets": _encoder,
    "answers": _nothing,
    "classes": _classes,
    "encoder_classes": _classes,
}
"""What a form of sample has beside the fields that all have."""


def slice_of(batch: Mapping[str, Tensor], topology: Topology) -> dict[str, Tensor]:
    """This data-parallel rank's contiguous part of a global batch."""
    samples = len(batch["tokens"])
    assert samples % topology.data_parallel_size == 0
    share = samples // topology.data_parallel_size
    first = topology.data_parallel_rank * share
    return {name: tensor[first : first + share] for name, tensor in batch.items()}
