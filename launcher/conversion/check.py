"""The proof of a conversion: our model and that of `transformers` compute the same logits from the same weights."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import families
from model.build import build
from model.config import ModelConfig
from parallel.common.errors import UserError
from parallel.config import ParallelConfig
from parallel.parameters import local_parameters
from parallel.topology import Topology

transformers: Any
try:
    import transformers
except ImportError:  # an extra: without it a conversion cannot be compared, and must be asked not to be
    transformers = None

TOLERANCE = 1e-4
"""Largest difference of a logit, times the largest logit: float32 sums in another order."""
_ROWS, _LENGTH = 2, 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """How both sides of an architecture are asked for the same numbers."""

    batch: Callable[[int, int], dict[str, Tensor]]
    """Random rows of a vocabulary's and a sequence's size, as our model reads them."""
    ours: Callable[[Any, int], list[Tensor]]
    """From what our model gives, and the rows of the vocabulary: what `theirs` gives."""
    theirs: Callable[[Path, dict[str, Tensor]], list[Tensor]]


def _random_batch(rows: int, length: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, rows, (_ROWS, length), generator=torch.Generator().manual_seed(0))
    return {
        "tokens": tokens,
        "positions": torch.arange(length).repeat(_ROWS, 1),
        "document_ids": torch.zeros(tokens.shape, dtype=torch.int32),
    }


def _causal_logits(theirs: Path, batch: dict[str, Tensor]) -> list[Tensor]:
    # `eager`, because other kernels of theirs leave out what they cannot do (a soft-cap) without a word.
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        theirs, dtype=torch.float32, attn_implementation="eager"
    )
    return [reference.eval()(batch["tokens"]).logits]


def _random_pairs(rows: int, length: int) -> dict[str, Tensor]:
    batch = _random_batch(rows, length)
    return batch | {"segment_ids": (batch["positions"] > length // 2).long()}


def _encoder_outputs(outputs: tuple[Tensor, ...], rows: int) -> list[Tensor]:
    """Logits, and of a pair that it follows and that it does not, as theirs has it."""
    return [outputs[0].transpose(0, 1)[..., :rows].cpu(), *(answers.flip(-1).cpu() for answers in outputs[1:])]


def _encoder_logits(theirs: Path, batch: dict[str, Tensor]) -> list[Tensor]:
    named = transformers.AutoConfig.from_pretrained(theirs).architectures or ()
    pairs = not any(name.endswith("ForMaskedLM") for name in named)
    kind = transformers.AutoModelForPreTraining if pairs else transformers.AutoModelForMaskedLM
    reference = kind.from_pretrained(theirs, dtype=torch.float32).eval()
    found = reference(batch["tokens"], token_type_ids=batch["segment_ids"])
    return [found.prediction_logits, found.seq_relationship_logits] if pairs else [found.logits]


def _random_streams(rows: int, length: int) -> dict[str, Tensor]:
    batch = _random_batch(rows, length)
    encoder = torch.randint(0, rows, (_ROWS, length + 7), generator=torch.Generator().manual_seed(1))
    return batch | {"encoder_tokens": encoder, "encoder_document_ids": torch.zeros(encoder.shape, dtype=torch.int32)}


def _encoder_decoder_logits(theirs: Path, batch: dict[str, Tensor]) -> list[Tensor]:
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(theirs, dtype=torch.float32).eval()
    return [reference(batch["encoder_tokens"], decoder_input_ids=batch["tokens"]).logits]


_COMPARISONS: Mapping[families.Architecture, _Comparison] = {
    families.Architecture.causal: _Comparison(
        batch=_random_batch,
        ours=lambda outputs, rows: [outputs.transpose(0, 1)[..., :rows].cpu()],
        theirs=_causal_logits,
    ),
    families.Architecture.encoder_decoder: _Comparison(
        batch=_random_streams,
        ours=lambda outputs, rows: [outputs.transpose(0, 1)[..., :rows].cpu()],
        theirs=_encoder_decoder_logits,
    ),
    families.Architecture.encoder: _Comparison(batch=_random_pairs, ours=_encoder_outputs, theirs=_encoder_logits),
}


def missing_transformers() -> None:
    """Refuses what needs `transformers` where it is not installed.

    Raises:
        UserError: it is not.
    """
    if transformers is None:
        raise UserError("comparing logits needs transformers: pip install 'bloomery[hf]', or call with --no-check.")


@torch.no_grad()
def compare_logits(model: ModelConfig, weights: Mapping[str, Tensor], theirs: Path, *, sequence_length: int) -> None:
    """Compares both models on random tokens, in float32 on this rank.

    Args:
        model: with its vocabulary size.
        weights: ours, float32 by global name.
        theirs: a directory that `transformers` reads.
        sequence_length: of training.

    Raises:
        UserError: the logits differ; it says by how much.
    """
    rows = model.unpadded_vocabulary_size or model.vocabulary_size
    assert rows is not None
    comparison = _COMPARISONS[families.family(model).architecture]
    batch = comparison.batch(rows, min(_LENGTH, sequence_length, model.positions or sequence_length))
    ours = comparison.ours(_our_outputs(model, weights, batch, sequence_length=sequence_length), rows)
    expected = comparison.theirs(theirs, batch)
    difference = max(
        float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, expected, strict=True)
    )
    logger.info("logits: ours and those of transformers differ by %.1e of the largest", difference)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits differ from those of transformers by {difference:.1e} of the largest, where {TOLERANCE:.0e} "
            "is rounding: the conversion of this model is wrong, and nothing was written"
        )


def _our_outputs(
    model: ModelConfig, weights: Mapping[str, Tensor], batch: dict[str, Tensor], *, sequence_length: int
) -> Tensor | tuple[Tensor, ...]:
    """What our model gives."""
    topology = Topology.create(ParallelConfig())
    assert model.vocabulary_size is not None
    (chunk,) = build(
        model,
        vocabulary_size=model.vocabulary_size,
        sequence_length=sequence_length,
        dtype=torch.float32,
        topology=topology,
        seed=0,
    )
    for local in local_parameters([chunk], last_stage_of_several=False):
        for shard in local.shards:
            described = shard.description
            value = weights[described.key][described.global_slice()]
            shard.of(local.parameter.data).copy_(value.view(described.local_shape))
    return chunk.eval()(batch)
