"""Configuration of the model: shapes and choices, nothing about ranks. Imports without torch."""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING


class FamilyName(StrEnum):
    """Model families, each in a file of its own."""

    llama = "llama"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A causal Transformer: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases."""

    family: FamilyName = FamilyName.llama
    layers: int = MISSING
    """Transformer blocks (attention and MLP together count as one)."""
    hidden_size: int = MISSING
    """Width of the residual stream."""
    heads: int = MISSING
    """Query heads."""
    kv_heads: int | None = None
    """Key and value heads, each shared by heads / kv_heads query heads; by default as many as query heads."""
    head_size: int | None = None
    """Width of one head; by default hidden_size / heads."""
    ffn_hidden_size: int = MISSING
    """Inner width of the MLP."""
    norm_eps: float = 1e-5
    """Added to the mean square inside RMSNorm."""
    rope_base: float = 10000.0
    """Base period of the rotary positions."""
    tie_embeddings: bool = False
    """Use the input embedding as the output layer's weight too."""
    vocabulary_size: int | None = None
    """Rows of the embedding, a multiple of 128; by default that of the store's tokenizer."""
    initial_std: float = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it / sqrt(2 x layers)."""
