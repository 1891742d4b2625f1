"""Configuration of the model: shapes and choices, nothing about ranks. Imports without torch."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class FamilyName(StrEnum):
    """Model families, each in a file of its own."""

    llama = "llama"


class Dispatcher(StrEnum):
    """How tokens reach the ranks that hold their experts."""

    alltoall = "alltoall"
    """Each token travels to its experts' ranks and back."""
    allgather = "allgather"
    """Every rank of the group sees every token; simple, and good for few ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """A mixture of experts in place of the MLP (Fedus et al., 2021, arXiv:2101.03961)."""

    experts: int = 0
    """Experts of each layer; 0: no mixture, every layer has its MLP."""
    top_k: int = 2
    """Experts that each token is sent to."""
    ffn_hidden_size: int | None = None
    """Inner width of one expert; by default that of the model."""
    shared_ffn_hidden_size: int | None = None
    """Inner width of an expert that every token passes besides its own (DeepSeekMoE, arXiv:2401.06066); by default
    there is none."""
    first_layer: int = 0
    """First layer with experts, counted from 0; those before keep their MLP."""
    normalise_top_k: bool = True
    """Whether the weights of a token's chosen experts add up to 1 (softmax after the choice)."""
    load_balance_loss: float = 0.01
    """Coefficient of the auxiliary loss that evens out the experts' shares of the tokens of a sequence-cut group."""
    z_loss: float = 0.0
    """Coefficient of the router's z-loss, which keeps its logits small (arXiv:2202.08906)."""
    dispatcher: Dispatcher = Dispatcher.alltoall


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A causal Transformer: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

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
    attention_bias: bool = False
    """Biases in the query, key and value projections (Qwen2)."""
    linear_bias: bool = False
    """Biases in every projection: attention and MLP, in and out."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotary positions (Qwen3)."""
    dropout: float = 0.0
    """Share of elements dropped after the embedding and after each attention and MLP; the same ones in every layout."""
    moe: MoeConfig = field(default_factory=MoeConfig)
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
