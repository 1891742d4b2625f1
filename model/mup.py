"""muP: learning rate and initial weights that were tuned on a narrow model hold on a wide one.

Yang et al., 2022, arXiv:2203.03466 (tables 3 and 8, for Adam). With m = hidden_size / model.mup.base_hidden_size:

    parameter                                  initial std             learning rate    weight decay
    embeddings, norms, biases                  initial_std             1                1
    matrices between widths                    initial_std / sqrt(m)   1 / m            m (the rate times it stays)
    router, outputs of classifiers             initial_std / m         1 / m            m
    output layer, also tied                    initial_std             1                1, and logits are times 1 / m
    adapters (model/lora.py)                   their own               1                1

Attention scores are divided by head_size, not by its root, times the root of `base_head_size`; so with heads of one
size at every width they are what they always are. At the base width nothing changes, to the bit. All widths are to
grow together: ffn_hidden_size and heads x head_size in proportion to hidden_size. Depth is not muP's to transfer: the
projections into the residual stream have their 1 / sqrt(2 x layers) as ever. Imports without torch.
"""

import re
from dataclasses import replace

from model.config import ModelConfig, MupConfig
from parallel.common.errors import UserError

_FIXED = re.compile(r"embedding|segments|output_layer|lora_[AB]$")
"""Matrices one side of which is no width, and that read what does not grow, or whose logits are scaled instead."""
_NARROWING = re.compile(r"router|classifier\.output|next_sentence_head\.classifier")
"""Matrices from a width to a few numbers."""


def width(config: ModelConfig) -> float:
    """How many times wider the model is than that for which its numbers were tuned; 1 without muP."""
    base = config.mup.base_hidden_size
    return 1.0 if base is None else config.hidden_size / base


def deviation_factor(name: str, config: ModelConfig) -> float:
    """By what the initial standard deviation of a matrix is multiplied, by its global name."""
    if _FIXED.search(name):
        return 1.0
    return width(config) ** (-1.0 if _NARROWING.search(name) else -0.5)


def learning_rate_factor(name: str, *, is_matrix: bool, config: ModelConfig) -> float:
    """By what the learning rate of a parameter is multiplied."""
    return 1 / width(config) if is_matrix and not _FIXED.search(name) else 1.0


def logit_factor(config: ModelConfig) -> float:
    """By what the output layer's sums are multiplied."""
    return 1 / width(config)


def score_divisor(config: ModelConfig) -> float | None:
    """What attention scores are divided by the root of, as `query_pre_attention_scalar`; None: by that of head_size."""
    base = config.mup.base_head_size
    head = config.head_size or config.hidden_size // config.heads
    return None if base is None or base == head else head**2 / base


def without(config: ModelConfig) -> ModelConfig:
    """A model without muP that computes the same with an output layer that is times `logit_factor`.

    Raises:
        UserError: there is no such model.
    """
    if config.mup == MupConfig():
        return config
    if config.tie_embeddings:
        raise UserError(
            "model.mup divides logits by how wide the model is, which an output layer that is the embedding cannot "
            "hold: a model with model.tie_embeddings is not converted"
        )
    divisor = score_divisor(config)
    if divisor is None:
        return replace(config, mup=MupConfig())
    if divisor != int(divisor):
        raise UserError(f"attention scores are divided by the root of {divisor:g}: only whole numbers are converted")
    return replace(config, mup=MupConfig(), query_pre_attention_scalar=int(divisor))
