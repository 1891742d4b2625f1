"""An encoder, or one pipeline stage of it: every token sees its whole document, and covered tokens are predicted.

Source: Devlin et al., 2018, arXiv:1810.04805. It stands on the same stack as the causal models, so pipelines, context
parallelism, packed documents, recomputation and dropout are the same code. megatron-core's `BertModel` is not used: its
blocks are pre-norm only, which no published BERT is, its norms refuse sequence parallelism, and it masks with dense
[sequence, sequence] tensors.
"""

from functools import partial
from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from model.config import ModelConfig, NormPlacement
from model.heads import MaskedHead, NextSentenceHead, OutputBias, SegmentEmbedding
from model.language_model import LanguageModel
from model.layer_context import LayerContext
from model.norms import norm
from parallel.topology import Topology


class MaskedLanguageModel(LanguageModel):
    """One chunk of a BERT."""

    mask = AttnMaskType.padding

    def __init__(
        self, layer_config: TransformerConfig, config: ModelConfig, *, topology: Topology, **options: Any
    ) -> None:
        super().__init__(layer_config, config, topology=topology, **options)
        self.segments = self.embedding_norm = None
        if self.pre_process:
            self.segments = SegmentEmbedding(layer_config)
            if config.norm_placement is NormPlacement.after:
                self.embedding_norm = norm(layer_config, config.hidden_size, config.norm_eps)
        if self.post_process and self.classifier is None:
            self.masked_head = MaskedHead(layer_config)
            self.output_bias = OutputBias(layer_config, self.vocab_size, topology)
            self.next_sentence_head = NextSentenceHead(layer_config, topology) if config.next_sentence else None

    def embed(self, batch: dict[str, Tensor], context: LayerContext) -> Tensor:
        """As above, with `segment_ids` [batch, sequence / context] of 0 and 1 in the batch; without them all are 0."""
        assert self.segments is not None
        device = self.topology.device
        tokens = batch["tokens"].to(device, non_blocking=True)
        hidden = self.embedding(input_ids=tokens, position_ids=batch["positions"].to(device, non_blocking=True))
        segment_ids = batch["segment_ids"].to(device, non_blocking=True) if "segment_ids" in batch else 0 * tokens
        hidden = hidden + self.segments(self.own(segment_ids.T))
        return self.dropped(hidden if self.embedding_norm is None else self.embedding_norm(hidden), context)

    def predict(self, hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The logits; and with the head for it, those of the rows' pairs [batch, 2]: not following, following."""
        if self.classifier is not None:
            return self.classifier(hidden)
        logits = super().predict(self.masked_head(hidden))
        return (self.output_bias(lambda bias: logits + bias), *self._answers(hidden))

    def losses(self, hidden: Tensor, batch: dict[str, Tensor], **_nothing: Any) -> tuple[Any, ...]:
        """What the covered tokens cost; and as above."""
        compute = partial(super().losses, self.masked_head(hidden), batch)
        return (self.output_bias(lambda bias: compute(bias=bias)), *self._answers(hidden))

    def _answers(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return () if self.next_sentence_head is None else (self.next_sentence_head(hidden),)
