"""The proof of a conversion: our model and that of `transformers` compute the same logits from the same weights.

A head for classes is compared where it is read: of a text at the end or the beginning of its row, of tokens at all.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import families
from model.build import build
from model.config import Classified, ModelConfig
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy
from parallel.config import ParallelConfig
from parallel.parameters import local_parameters
from parallel.topology import Topology

transformers = Lazy("transformers")
"""An extra: without it a conversion cannot be compared, and must be asked not to be."""

TOLERANCE = 1e-4
"""Largest difference of a logit, times the largest logit: float32 sums in another order."""
_ROWS, _LENGTH = 2, 32
KERNEL = "eager"
"""Other kernels of theirs leave out what they cannot do (a soft-cap) without a word."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """How both sides of an architecture are asked for the same numbers."""

    batch: Callable[[int, int], dict[str, Tensor]]
    """Random rows of a vocabulary's and a sequence's size, as our model reads them."""
    ours: Callable[[Any, int], list[Tensor]]
    """From what our model gives, and the rows of the vocabulary: what `theirs` gives."""
    kind: Callable[[Sequence[str]], Any]
    """From the names of architectures in a config.json, the class of `transformers` that makes the model."""
    theirs: Callable[[Any, dict[str, Tensor]], list[Tensor]]
    """What that model gives."""


def _random_batch(rows: int, length: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, rows, (_ROWS, length), generator=torch.Generator().manual_seed(0))
    return {
        "tokens": tokens,
        "positions": torch.arange(length).repeat(_ROWS, 1),
        "document_ids": torch.zeros(tokens.shape, dtype=torch.int32),
    }


def _random_pairs(rows: int, length: int) -> dict[str, Tensor]:
    batch = _random_batch(rows, length)
    return batch | {"segment_ids": (batch["positions"] > length // 2).long()}


def _encoder_outputs(outputs: tuple[Tensor, ...], rows: int) -> list[Tensor]:
    """Logits, and of a pair that it follows and that it does not, as theirs has it."""
    return [outputs[0].transpose(0, 1)[..., :rows].cpu(), *(answers.flip(-1).cpu() for answers in outputs[1:])]


def _encoder_kind(architectures: Sequence[str]) -> Any:
    masked = any(name.endswith("ForMaskedLM") for name in architectures)
    return transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForPreTraining


def _encoder_logits(reference: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    found = reference(batch["tokens"], token_type_ids=batch["segment_ids"])
    pairs = hasattr(found, "prediction_logits")
    return [found.prediction_logits, found.seq_relationship_logits] if pairs else [found.logits]


def _random_streams(rows: int, length: int) -> dict[str, Tensor]:
    batch = _random_batch(rows, length)
    encoder = torch.randint(0, rows, (_ROWS, length + 7), generator=torch.Generator().manual_seed(1))
    return batch | {"encoder_tokens": encoder, "encoder_document_ids": torch.zeros(encoder.shape, dtype=torch.int32)}


def _encoder_decoder_logits(reference: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    return [reference(batch["encoder_tokens"], decoder_input_ids=batch["tokens"]).logits]


def _class_logits(reference: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Row by row: a causal model without an id for padding reads no more at a time."""
    segments = {"token_type_ids": batch["segment_ids"]} if "segment_ids" in batch else {}
    rows = [
        reference(tokens[None], **{name: value[row, None] for name, value in segments.items()}).logits
        for row, tokens in enumerate(batch["tokens"])
    ]
    return [torch.cat(rows)]


_COMPARISONS: Mapping[families.Architecture, _Comparison] = {
    families.Architecture.causal: _Comparison(
        batch=_random_batch,
        ours=lambda outputs, rows: [outputs.transpose(0, 1)[..., :rows].cpu()],
        kind=lambda architectures: transformers.AutoModelForCausalLM,
        theirs=lambda reference, batch: [reference(batch["tokens"]).logits],
    ),
    families.Architecture.encoder: _Comparison(
        batch=_random_pairs, ours=_encoder_outputs, kind=_encoder_kind, theirs=_encoder_logits
    ),
    families.Architecture.encoder_decoder: _Comparison(
        batch=_random_streams,
        ours=lambda outputs, rows: [outputs.transpose(0, 1)[..., :rows].cpu()],
        kind=lambda architectures: transformers.AutoModelForSeq2SeqLM,
        theirs=_encoder_decoder_logits,
    ),
}


def _comparison(model: ModelConfig) -> _Comparison:
    architecture = families.family(model).architecture
    plain = _COMPARISONS[architecture]
    if not model.classes.number:
        return plain
    if model.classes.of is Classified.tokens:
        return replace(
            plain,
            ours=lambda outputs, rows: [outputs.transpose(0, 1).cpu()],
            kind=lambda architectures: transformers.AutoModelForTokenClassification,
            theirs=_class_logits,
        )
    place = 0 if architecture is families.Architecture.encoder else -1
    return replace(
        plain,
        ours=lambda outputs, rows: [outputs[place].cpu()],
        kind=lambda architectures: transformers.AutoModelForSequenceClassification,
        theirs=_class_logits,
    )


def missing_transformers() -> None:
    """Refuses what needs `transformers` where it is not installed.

    Raises:
        UserError: it is not.
    """
    if not transformers.is_installed:
        raise UserError("comparing logits needs transformers: pip install 'bloomery[hf]', or call with --no-check.")


def pretrained(directory: Path, model: ModelConfig) -> Any:
    """The model of `transformers` in a directory that it reads, float32."""
    kind = _kind(transformers.AutoConfig.from_pretrained(directory), model)
    return kind.from_pretrained(directory, dtype=torch.float32, attn_implementation=KERNEL)


def described(config: Path, model: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """The model of `transformers` that a config.json describes, float32, with these weights.

    Raises:
        UserError: it has a weight that is not among them.
    """
    found = transformers.AutoConfig.from_pretrained(config)
    made = _kind(found, model).from_config(found, dtype=torch.float32, attn_implementation=KERNEL)
    missing, _ = made.load_state_dict(dict(weights), strict=False)
    tied = {"lm_head.weight"} if made.config.tie_word_embeddings else set()
    if left := sorted(set(missing) - tied):
        raise UserError(f"the {type(made).__name__} of {config} has a weight {left[0]} that the checkpoint lacks.")
    return made


def _kind(found: Any, model: ModelConfig) -> Any:
    return _comparison(model).kind(found.architectures or ())


@torch.no_grad()
def compare_logits(model: ModelConfig, weights: Mapping[str, Tensor], reference: Any, *, sequence_length: int) -> None:
    """Compares both models on random tokens, in float32 on this rank.

    Args:
        model: with its vocabulary size.
        weights: ours, float32 by global name.
        reference: the model of `transformers`, float32.
        sequence_length: of training.

    Raises:
        UserError: the logits differ; it says by how much.
    """
    rows = model.unpadded_vocabulary_size or model.vocabulary_size
    assert rows is not None
    comparison = _comparison(model)
    batch = comparison.batch(rows, min(_LENGTH, sequence_length, model.positions or sequence_length))
    padding = reference.config.pad_token_id
    if padding is not None:  # where a text ends is where a causal model of theirs finds the first one
        batch["tokens"] = batch["tokens"].where(batch["tokens"] != padding, (padding + 1) % rows)
    ours = comparison.ours(our_outputs(model, weights, batch, sequence_length=sequence_length), rows)
    expected = comparison.theirs(reference.eval(), batch)
    difference = max(
        float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, expected, strict=True)
    )
    logger.info("logits: ours and those of transformers differ by %.1e of the largest", difference)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits differ from those of transformers by {difference:.1e} of the largest, where {TOLERANCE:.0e} "
            "is rounding: the conversion of this model is wrong, and nothing was written"
        )


def our_outputs(
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
