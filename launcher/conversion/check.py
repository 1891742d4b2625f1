"""The proof of a conversion: our model and that of `transformers` compute the same logits from the same weights."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    length = min(_LENGTH, sequence_length, model.positions or sequence_length)
    rows = model.unpadded_vocabulary_size or model.vocabulary_size
    assert rows is not None
    tokens = torch.randint(0, rows, (_ROWS, length), generator=torch.Generator().manual_seed(0))
    ours = _our_logits(model, weights, tokens, sequence_length=sequence_length)[..., :rows]
    # `eager`, because other kernels of theirs leave out what they cannot do (a soft-cap) without a word.
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        theirs, dtype=torch.float32, attn_implementation="eager"
    )
    expected = reference.eval()(tokens).logits
    difference = float((ours - expected).abs().max() / expected.abs().max())
    logger.info("logits: ours and those of transformers differ by %.1e of the largest", difference)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the logits differ from those of transformers by {difference:.1e} of the largest, where {TOLERANCE:.0e} "
            "is rounding: the conversion of this model is wrong, and nothing was written"
        )


def _our_logits(model: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor, *, sequence_length: int) -> Tensor:
    """[batch, sequence, vocabulary], on the CPU."""
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
    batch = {
        "tokens": tokens,
        "positions": torch.arange(tokens.shape[1]).repeat(len(tokens), 1),
        "document_ids": torch.zeros(tokens.shape, dtype=torch.int32),
    }
    return chunk.eval()(batch).transpose(0, 1).cpu()
