"""A causal language model, or one pipeline stage of it: tokens to logits.

megatron-core's `HybridModel` builds the embedding, the layers and the output; this subclass replaces its forward by the
twenty lines that pretraining needs, with positions and document borders per token.
"""

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from model.attention import AttentionContext, RotaryTable, document_lengths
from model.specs import layer_pattern, transformer_stack
from parallel.topology import Topology


class CausalLanguageModel(HybridModel):
    """One chunk: the embedding on the first, the output layer on the last, its share of the layers on each."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocabulary_size: int,
        sequence_length: int,
        rope_base: float,
        tie_embeddings: bool,
        topology: Topology,
        chunk: int,
    ) -> None:
        stages, chunks = topology.config.pipeline, topology.config.virtual_pipeline
        super().__init__(
            config,
            hybrid_stack_spec=transformer_stack(),
            vocab_size=vocabulary_size,
            max_sequence_length=sequence_length,
            hybrid_layer_pattern=layer_pattern(config.num_layers, stages * chunks),
            pre_process=topology.is_first_pipeline_stage and chunk == 0,
            post_process=topology.is_last_pipeline_stage and chunk == chunks - 1,
            share_embeddings_and_output_weights=tie_embeddings,
            position_embedding_type="none",
            pg_collection=topology.groups,
            vp_stage=chunk if chunks > 1 else None,
        )
        head_size = config.kv_channels or config.hidden_size // config.num_attention_heads
        self.rotary = RotaryTable(
            head_size=head_size,
            base=rope_base,
            sequence_length=sequence_length,
            dtype=config.params_dtype,
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A batch (INTERFACES: `tokens`, `positions`, `document_ids`, each [batch, sequence], on the CPU or the
        device).

        Returns:
            The logits [sequence, batch, vocabulary / tensor] on the last chunk; else hidden states
            [sequence (/ tensor under sequence parallelism), batch, hidden].
        """
        device = self.rotary.table.device
        cosine, sine = self.rotary(batch["positions"].to(device, non_blocking=True))
        context = AttentionContext(
            cosine=cosine, sine=sine, document_lengths=document_lengths(batch["document_ids"].cpu())
        )
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=batch["tokens"].to(device, non_blocking=True), position_ids=None)
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=context)
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden, weight=weight)
        return logits
