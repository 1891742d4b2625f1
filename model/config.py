"""Configuration of the model: shapes and choices, nothing about ranks. Imports without torch."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING


class FamilyName(StrEnum):
    """The families that are here: whose names the weights have in Hugging Face's format (model/hf/)."""

    gpt2 = "gpt2"
    llama = "llama"
    mistral = "mistral"
    mixtral = "mixtral"
    qwen2 = "qwen2"
    qwen3 = "qwen3"
    qwen3_moe = "qwen3_moe"
    gpt_neox = "gpt_neox"
    gemma2 = "gemma2"
    gemma3 = "gemma3_text"
    deepseek_v2 = "deepseek_v2"
    deepseek_v3 = "deepseek_v3"
    bert = "bert"
    t5 = "t5"


class ObjectiveName(StrEnum):
    """What training minimises (model/objectives.py), each over samples of its own form (data_pipeline/forms.py)."""

    causal_lm = "causal_lm"
    """Every token from those before it in its document."""
    prefix_lm = "prefix_lm"
    """The rest of every document from its beginning, whose tokens all see each other (Raffel et al., 2019)."""
    masked_lm = "masked_lm"
    """Tokens that were covered, from all others of their document (BERT; Devlin et al., 2018, arXiv:1810.04805)."""
    masked_lm_next_sentence = "masked_lm_next_sentence"
    """The same over pairs of segments, and of each pair whether one follows the other in a document."""
    span_corruption = "span_corruption"
    """Spans that were cut out of a document, from what is left of it (T5; Raffel et al., 2019, arXiv:1910.10683)."""
    answers = "answers"
    """Of an example only what it teaches: the assistant's turns, or the completion of a prompt."""
    seq2seq = "seq2seq"
    """The same, told by a decoder from what its encoder reads of the example."""
    classification = "classification"
    """Which of model.classes a text, or each of its words, is of."""


class Norm(StrEnum):
    """Normalisation before attention, before the MLP and at the end."""

    rms = "rms"
    """Root mean square, a weight (Zhang and Sennrich, 2019, arXiv:1910.07467)."""
    zero_centered_rms = "zero_centered_rms"
    """The same with a weight that is counted from one: zero leaves the size as it is (Gemma)."""
    layer = "layer"
    """Mean and variance, a weight and a bias (Ba et al., 2016, arXiv:1607.06450)."""


class NormPlacement(StrEnum):
    """Where a block has its norms."""

    before = "before"
    """Attention and MLP read the residual stream through a norm, and one stands behind the last block."""
    after = "after"
    """The sum that each of them makes is normed, and the embedding is (Vaswani et al., 2017; BERT)."""


class Activation(StrEnum):
    """What the MLP does between its matrices."""

    swiglu = "swiglu"
    """One half times the SiLU of the other (Shazeer, 2020, arXiv:2002.05202)."""
    geglu = "geglu"
    """One half times the GELU of the other."""
    gelu = "gelu"
    """GELU in its tanh approximation, no gate (GPT-2)."""
    relu = "relu"
    """What is above zero, no gate (the first T5)."""
    exact_gelu = "exact_gelu"
    """GELU by the error function, no gate (GPT-NeoX)."""

    @property
    def gated(self) -> bool:
        """Whether the first matrix is twice as wide: gates, and what they gate."""
        return self in (Activation.swiglu, Activation.geglu)


class Position(StrEnum):
    """How a token knows its place in its document."""

    rope = "rope"
    learned = "learned"
    """A table of embeddings, added to the tokens' (GPT-2)."""
    relative = "relative"
    """A table of what a distance adds to the scores of each head (T5)."""


class RopeScaling(StrEnum):
    """How rotary positions are stretched for sequences longer than those that a model was trained on."""

    linear = "linear"
    """Every wave gets `factor` times longer."""
    ntk = "ntk"
    """A larger base period, by `factor` and train.sequence_length / original_positions; up to these nothing changes."""
    yarn = "yarn"
    """Long waves get longer, short ones stay, smoothly between by wave number; attention gets sharper."""
    llama3 = "llama3"
    """Long waves get longer, short ones stay, smoothly between by frequency (Llama 3.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScalingConfig:
    """Stretching of rotary positions, for context extension in continued training."""

    kind: RopeScaling = RopeScaling.llama3
    factor: float = 1.0
    """How much longer the longest waves get; 1: nothing is stretched, whatever the kind."""
    original_positions: int = 8192
    """Length of the sequences that the model was trained on before."""
    low_frequency_factor: float = 1.0
    """llama3: waves longer than original_positions / this are stretched whole."""
    high_frequency_factor: float = 4.0
    """llama3: waves shorter than original_positions / this stay."""
    beta_fast: float = 32.0
    """yarn: pairs that turn more often than this within original_positions stay."""
    beta_slow: float = 1.0
    """yarn: pairs that turn less often than this within original_positions are stretched whole."""
    attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied by; by default 0.1 ln(factor) + 1, or the ratio of the two below."""
    mscale: float | None = None
    """yarn: weight of the logarithm in that factor (DeepSeek)."""
    mscale_all_dim: float | None = None
    """yarn: weight of the logarithm in what that factor is divided by (DeepSeek)."""
    truncate: bool = True
    """yarn: whether the two borders are rounded to whole pairs."""


class Dispatcher(StrEnum):
    """How tokens reach the ranks that hold their experts."""

    alltoall = "alltoall"
    """Each token travels to its experts' ranks and back."""
    allgather = "allgather"
    """Every rank of the group sees every token; simple, and good for few ranks."""


class RouterScore(StrEnum):
    """How the router's logits become an expert's weight."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    """Each expert by itself (DeepSeek-V3)."""


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
    score: RouterScore = RouterScore.softmax
    scale: float = 1.0
    """What the weights of the chosen experts are multiplied by."""
    groups: int = 1
    """Groups of neighbouring experts, of which a token's experts come from few (DeepSeek-V2)."""
    top_groups: int = 1
    """Groups that each token's experts come from."""
    group_experts: int = 1
    """A group's score is the sum of its best so many (1 in DeepSeek-V2, 2 in V3)."""
    expert_bias: bool = False
    """Add a learnt number to each expert's score, for the choice alone (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
    V3 moves it by a fixed step against the expert's load; here that load is its gradient, and the optimizer steps, so
    that it is the same in every layout and is saved as any weight."""
    bias_loss: float = 0.001
    """Coefficient of that gradient: choices of an expert beyond an even share, per token."""
    load_balance_loss: float = 0.01
    """Coefficient of the auxiliary loss that evens out the experts' shares of the tokens of a sequence-cut group."""
    z_loss: float = 0.0
    """Coefficient of the router's z-loss, which keeps its logits small (arXiv:2202.08906)."""
    dispatcher: Dispatcher = Dispatcher.alltoall


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentConfig:
    """Attention over keys and values that are made of one narrow latent (DeepSeek-V2, arXiv:2405.04434)."""

    kv_rank: int | None = None
    """Width of the latent of keys and values; by default there is none, and attention is the usual one."""
    q_rank: int | None = None
    """Width of the latent of queries; by default queries are made of the hidden state."""
    rope_head_size: int = 64
    """Channels of model.head_size that turn with the position; a key's are the same in all heads."""
    value_head_size: int = 128
    """Width of one value head."""


class Classified(StrEnum):
    """What a class is of."""

    texts = "texts"
    """The whole of a text: read at its first token by an encoder, at its last one by a causal model."""
    tokens = "tokens"
    """Each word of a text, at the first of its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassesConfig:
    """A head that tells classes apart, in place of the output layer."""

    number: int = 0
    """Classes; 0: no such head, the model predicts tokens."""
    of: Classified = Classified.texts


@dataclass(frozen=True, kw_only=True, slots=True)
class MupConfig:
    """Maximal update parametrisation: optimizer.learning_rate and model.initial_std of a narrow model hold for a wide
    one (Yang et al., 2022, arXiv:2203.03466; model/mup.py has the table)."""

    base_hidden_size: int | None = None
    """hidden_size of the model for which they were tuned; by default they are this model's own."""
    base_head_size: int | None = None
    """head_size of that model; by default this model's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Adapters of low rank beside the matrices of attention and MLP, y = W x + alpha / rank x B A x. They are trained
    and nothing else is, but for a new head for classes (Hu et al., 2021, arXiv:2106.09685; model/lora.py)."""

    rank: int | None = None
    """Rows of A and columns of B; by default there are no adapters."""
    alpha: float | None = None
    """By default the rank: what B and A make is added as it is."""
    targets: list[str] = field(default_factory=list)
    """Matrices that get one, by their names in the field: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj,
    down_proj; empty: all that the model has."""
    dropout: float = 0.0
    """Share of the elements of x that A does not see in training; the same ones in every layout."""
    initial_std: float = 0.0
    """Standard deviation of B's initial values; 0: training begins with the very model that is adapted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Transformer; by default a Llama: RMSNorm, rotary positions, grouped queries, SwiGLU."""

    family: str = "llama"
    """Whose layers, objectives and names in Hugging Face's format: gpt2, llama, mistral, mixtral, qwen2, qwen3,
    qwen3_moe, gpt_neox, gemma2, gemma3_text, deepseek_v2, deepseek_v3, bert, t5, or one that a plugin registers."""
    layers: int = MISSING
    """Transformer blocks (attention and MLP together count as one)."""
    decoder_layers: int | None = None
    """Blocks of the decoder behind an encoder of `layers` (T5); by default there is none."""
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
    activation: Activation = Activation.swiglu
    norm: Norm = Norm.rms
    norm_placement: NormPlacement = NormPlacement.before
    position: Position = Position.rope
    positions: int | None = None
    """Longest sequence that the model is made for: rows of the table of learned positions, and what an export says; by
    default train.sequence_length."""
    sliding_window: int | None = None
    """How many tokens back attention reaches, its own included (Mistral); by default to the document's start."""
    full_attention_every: int | None = None
    """With a sliding window: each n-th layer reaches to the document's start (2 in Gemma 2, 6 in Gemma 3); by default
    none does."""
    pattern: str | None = None
    """Kinds of the layers, a letter each, from the first on and over again: `W` attends within the sliding window, `F`
    to the document's start (`WWWF`); where full_attention_every is too regular. By default all are the same."""
    query_pre_attention_scalar: int | None = None
    """Attention scores are divided by the square root of this; by default head_size (Gemma)."""
    attention_softcap: float | None = None
    """Attention scores s become cap * tanh(s / cap) (Gemma 2); by default they stay."""
    logit_softcap: float | None = None
    """The same for the logits."""
    attention_bias: bool = False
    """Biases in the query, key and value projections (Qwen2)."""
    linear_bias: bool = False
    """Biases in every projection: attention and MLP, in and out."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotary positions (Qwen3)."""
    post_norms: bool = False
    """Norms also of what attention and MLP found, before it is added to the residual stream (Gemma)."""
    parallel_residual: bool = False
    """The MLP reads what attention reads, not what attention wrote (GPT-NeoX)."""
    scale_embeddings: bool = False
    """Embeddings are multiplied by the square root of hidden_size (Gemma)."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    relative_buckets: int = 32
    """Rows of the table of relative positions."""
    relative_distance: int = 128
    """Distance from which on all keys share the last bucket."""
    next_sentence: bool = False
    """A head that says of a pair of segments whether one follows the other in its document (BERT)."""
    classes: ClassesConfig = field(default_factory=ClassesConfig)
    dropout: float = 0.0
    """Share of elements dropped after the embedding and after each attention and MLP; the same ones in every layout."""
    moe: MoeConfig = field(default_factory=MoeConfig)
    norm_eps: float = 1e-5
    """Added to the mean square, or to the variance, inside the norms."""
    rope_base: float = 10000.0
    """Base period of the rotary positions."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    rope_share: float = 1.0
    """Share of each head's channels, its first ones, that turn with the position (GPT-NeoX: a quarter)."""
    rope_local_base: float | None = None
    """Base period, never stretched, in the layers with a sliding window (Gemma 3); by default rope_base."""
    tie_embeddings: bool = False
    """Use the input embedding as the output layer's weight too."""
    vocabulary_size: int | None = None
    """Rows of the embedding, a multiple of 128; by default that of the store's tokenizer."""
    unpadded_vocabulary_size: int | None = None
    """Rows of an imported embedding; those behind only fill up to a multiple of 128, and an export leaves them out."""
    initial_std: float = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it / sqrt(2 x layers)."""
    mup: MupConfig = field(default_factory=MupConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that turn with the position."""
        if self.latent.kv_rank is not None:
            return self.latent.rope_head_size
        return int((self.head_size or self.hidden_size // self.heads) * self.rope_share)

    @property
    def trains_tied_embeddings(self) -> bool:
        """Whether the first and the last pipeline stage have gradients of one matrix to add up."""
        return self.tie_embeddings and self.lora.rank is None

    @property
    def depth(self) -> int:
        """Blocks of all stacks."""
        return self.layers + (self.decoder_layers or 0)

    def window(self, layer: int) -> int | None:
        """How many tokens back the attention of a layer, counted from 0, reaches; None: to the document's start."""
        if self.pattern is not None:
            return self.sliding_window if self.pattern[layer % len(self.pattern)] == "W" else None
        every = self.full_attention_every
        return None if every is not None and (layer + 1) % every == 0 else self.sliding_window
