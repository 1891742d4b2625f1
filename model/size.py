"""How large a model is and what a token costs, as arithmetic on its configuration.

FLOPs count a multiplication and an addition as two. A training step costs three forward passes (one forward, two
backward; two in all of matrices that adapters freeze); recomputation is not counted, because it does no useful work.
Source of the counting: Chowdhery et al., 2022, arXiv:2204.02311, appendix B.
"""

from model.config import ModelConfig, Norm, Position
from model.families import family
from model.projections import BLOCK, CROSSING, adapter_parameters

FP8_TILE = 16
"""What every length of a product in eight bits is to be a multiple of."""
_CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
"""Float32 logits that are there at a time: what a CPU's cache holds, and what keeps an accelerator's products large."""


def logit_rows(vocabulary_share: int, device_type: str) -> int:
    """Tokens whose logits, as many as a tensor rank has, are there at a time where cross-entropy goes in chunks."""
    return max(64, _CHUNK_BYTES[device_type] // (4 * vocabulary_share))


def head_size(config: ModelConfig) -> int:
    """Width of one attention head."""
    return config.head_size or config.hidden_size // config.heads


def _attention_matrices(config: ModelConfig) -> int:
    """Parameters of one block's queries, keys, values and output projection."""
    query, latent = config.heads * head_size(config), config.latent
    if latent.kv_rank is None:
        key_value = (config.kv_heads or config.heads) * head_size(config)
        return config.hidden_size * (2 * query + 2 * key_value)
    values = config.heads * latent.value_head_size
    turning = config.heads * latent.rope_head_size
    queries = query * (latent.q_rank or config.hidden_size) + config.hidden_size * (latent.q_rank or 0)
    down = config.hidden_size * (latent.kv_rank + latent.rope_head_size)
    return queries + down + latent.kv_rank * (query - turning + values) + values * config.hidden_size


def has_experts(config: ModelConfig, layer: int) -> bool:
    """Whether a layer, counted from 0, has a mixture of experts in place of its MLP."""
    return config.moe.experts > 0 and layer >= config.moe.first_layer


def _mlp_matrices(config: ModelConfig, layer: int, *, active: bool) -> int:
    """Parameters of one block's gates, ups and downs, and of its router; `active`: those that one token passes."""
    moe = config.moe
    per_width = (3 if config.activation.gated else 2) * config.hidden_size
    if not has_experts(config, layer):
        return per_width * config.ffn_hidden_size
    experts = moe.top_k if active else moe.experts
    inner = experts * (moe.ffn_hidden_size or config.ffn_hidden_size) + (moe.shared_ffn_hidden_size or 0)
    return per_width * inner + config.hidden_size * moe.experts


def _matrices(config: ModelConfig, *, active: bool) -> int:
    layers = range(config.layers)
    return sum(_attention_matrices(config) + _mlp_matrices(config, layer, active=active) for layer in layers)


def _biases_and_head_norms(config: ModelConfig) -> int:
    """Parameters of one block beside its matrices and its two norms."""
    query = config.heads * head_size(config)
    key_value = (config.kv_heads or config.heads) * head_size(config)
    count = 2 * head_size(config) if config.qk_norm else 0
    if config.latent.kv_rank is not None:
        count += config.latent.kv_rank + (config.latent.q_rank or 0)
    if config.attention_bias or config.linear_bias:
        count += query + 2 * key_value
    if config.linear_bias:
        inner = config.ffn_hidden_size * (2 if config.activation.gated else 1)
        count += 2 * config.hidden_size + inner
    return count


def parameter_count(config: ModelConfig, vocabulary_size: int, sequence_length: int = 0) -> int:
    """All parameters; a tied embedding counts once. The length is that of learned positions without `positions`."""
    in_a_block = 4 if config.post_norms else 2
    norms = (in_a_block * config.layers + 1) * config.hidden_size * (2 if config.norm is Norm.layer else 1)
    if config.position is Position.learned:
        norms += (config.positions or sequence_length) * config.hidden_size
    beside = family(config).beside(config, vocabulary_size)
    once = config.tie_embeddings or config.classes.number
    embeddings = vocabulary_size * config.hidden_size * (1 if once else 2) + beside
    if config.moe.expert_bias:
        norms += config.moe.experts * sum(has_experts(config, layer) for layer in range(config.layers))
    adapters = config.depth * adapter_parameters(config, *BLOCK)
    adapters += (config.decoder_layers or 0) * adapter_parameters(config, *CROSSING)
    blocks = _matrices(config, active=False) + config.layers * _biases_and_head_norms(config)
    return blocks + norms + embeddings + adapters


def flops_per_token(
    config: ModelConfig, vocabulary_size: int, sequence_length: int, *, causal: bool, decoder_length: int = 0
) -> float:
    """Training FLOPs of one token: 6 for each matrix parameter that it passes, the output layer included, the input
    embedding not (4 for those that adapters freeze, which have no gradient); and attention over the sequence or a
    layer's window, halved where `causal` counts only the half that a causal mask leaves.
    """
    if config.decoder_layers is not None:
        return _flops_of_two_stacks(config, vocabulary_size, sequence_length, decoder_length, causal=causal)
    matrices = _matrices(config, active=True) + config.hidden_size * (config.classes.number or vocabulary_size)
    reached = sum(_reached(config, layer, sequence_length) for layer in range(config.layers))
    values = config.latent.value_head_size if config.latent.kv_rank is not None else head_size(config)
    attention = 6 * config.heads * (head_size(config) + values) * reached
    adapters = 6 * config.layers * adapter_parameters(config, *BLOCK)
    return _per_parameter(config) * matrices + adapters + attention * (0.5 if causal else 1.0)


def _per_parameter(config: ModelConfig) -> int:
    """FLOPs of a token in each parameter of a matrix."""
    return 6 if config.lora.rank is None else 4


def _flops_of_two_stacks(
    config: ModelConfig, vocabulary_size: int, sequence_length: int, decoder_length: int, *, causal: bool
) -> float:
    """Of one of the encoder's tokens, with its share of the decoder's, which is shorter: cross attention makes keys and
    values of the encoder's tokens, queries and what follows of the decoder's."""
    assert config.decoder_layers is not None
    channels = config.heads * head_size(config)
    half = 2 * config.hidden_size * channels  # queries and output, or keys and values, of an attention
    mlp, each = _mlp_matrices(config, 0, active=True), _per_parameter(config)
    block, keys, others = (
        6 * adapter_parameters(config, *linears) for linears in (BLOCK, ("linear_kv",), ("linear_q", "linear_proj"))
    )
    encoder = config.layers * (each * (2 * half + mlp) + block + 12 * channels * sequence_length)
    encoder += config.decoder_layers * (each * half + keys)
    seen = decoder_length * (0.5 if causal else 1.0) + sequence_length
    decoder = config.decoder_layers * (each * (3 * half + mlp) + block + others + 12 * channels * seen)
    decoder += each * config.hidden_size * vocabulary_size
    return encoder + decoder * decoder_length / sequence_length


def _reached(config: ModelConfig, layer: int, sequence_length: int) -> float:
    """Twice the tokens that one attends to, its own included, on average over a sequence: all of them, for long ones;
    with a window w, 2 w - w^2 / sequence."""
    window = config.window(layer)
    if window is None or window >= sequence_length:
        return sequence_length
    return 2 * window - window**2 / sequence_length
