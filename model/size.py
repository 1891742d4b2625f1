"""How large a model is and what a token costs, as arithmetic on its configuration.

FLOPs count a multiplication and an addition as two. A training step costs three forward passes (one forward, two
backward); recomputation is not counted, because it does no useful work. Source of the counting: Chowdhery et al., 2022,
arXiv:2204.02311, appendix B.
"""

from model.config import ModelConfig


def head_size(config: ModelConfig) -> int:
    """Width of one attention head."""
    return config.head_size or config.hidden_size // config.heads


def layer_matrix_parameters(config: ModelConfig) -> int:
    """Parameters of one block's matrices: queries, keys, values, output projection; gate, up and down."""
    query = config.heads * head_size(config)
    key_value = (config.kv_heads or config.heads) * head_size(config)
    attention = config.hidden_size * (2 * query + 2 * key_value)
    return attention + 3 * config.hidden_size * config.ffn_hidden_size


def parameter_count(config: ModelConfig, vocabulary_size: int) -> int:
    """All parameters; a tied embedding counts once."""
    norms = (2 * config.layers + 1) * config.hidden_size
    embeddings = vocabulary_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    return config.layers * layer_matrix_parameters(config) + norms + embeddings


def flops_per_token(config: ModelConfig, vocabulary_size: int, sequence_length: int, *, causal: bool) -> float:
    """Training FLOPs of one token: 6 for each matrix parameter, the output layer included, the input embedding not; and
    attention over the sequence, halved where `causal` counts only the half that a causal mask leaves.
    """
    matrices = config.layers * layer_matrix_parameters(config) + config.hidden_size * vocabulary_size
    attention = 12 * config.layers * config.heads * head_size(config) * sequence_length
    return 6 * matrices + attention * (0.5 if causal else 1.0)
