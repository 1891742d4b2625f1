"""A causal language model, or one pipeline stage of it: tokens to logits.

megatron-core's `HybridModel` builds the embedding, the layers and the output; this subclass replaces its forward by the
few lines that pretraining needs, with positions and document borders per token.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from model.attention import find_pieces
from model.config import Classified, ModelConfig, Position
from model.cross_entropy import ChunkedCrossEntropy, LogitForm, TokenLosses
from model.dropout import drop, token_keys
from model.heads import Classifier
from model.layer_context import LayerContext
from model.moe import summary, take_sums
from model.mup import logit_factor
from model.rope import local_rotary_table, rotary_table
from model.specs import layer_pattern, transformer_stack
from parallel.config import ParallelConfig
from parallel.topology import Topology


class LanguageModel(HybridModel):
    """One chunk of a causal language model, and of what others change a little: the embedding on the first, the output
    layer on the last, its share of the layers on each."""

    mask = AttnMaskType.causal
    """What a token sees of its document: `causal`, or all of it (`padding`)."""

    def __init__(
        self,
        layer_config: TransformerConfig,
        config: ModelConfig,
        *,
        vocabulary_size: int,
        sequence_length: int,
        topology: Topology,
        chunk: int,
        seed: int,
    ) -> None:
        layout = topology.config
        super().__init__(
            layer_config,
            hybrid_stack_spec=self.stack(config),
            vocab_size=vocabulary_size,
            max_sequence_length=config.positions or sequence_length,
            hybrid_layer_pattern=self.pattern(config, layout),
            pre_process=topology.is_first_pipeline_stage and chunk == 0,
            post_process=topology.is_last_pipeline_stage and chunk == layout.virtual_pipeline - 1,
            share_embeddings_and_output_weights=config.tie_embeddings and not config.classes.number,
            position_embedding_type="learned_absolute" if config.position is Position.learned else "none",
            pg_collection=topology.groups,
            vp_stage=chunk if layout.virtual_pipeline > 1 else None,
        )
        if self.pre_process:
            self.embedding.embedding_dropout = torch.nn.Dropout(0.0)  # ours follows in `forward`
            self.embedding.to(layer_config.params_dtype)  # the table of positions is made in float32
        self.classifier = None
        if self.post_process and config.classes.number:
            encoder, of_texts = self.mask is AttnMaskType.padding, config.classes.of is Classified.texts
            self.output_layer: Any = None
            self.classifier = Classifier(
                layer_config,
                topology,
                classes=config.classes.number,
                pooled=encoder and of_texts,
                bias=encoder or not of_texts,
            )
        self.description = config
        self.logit_factor = logit_factor(config)
        self.cross_entropy: ChunkedCrossEntropy | None = None
        self.topology = topology
        self.seed = seed
        self.rotary = self.local_rotary = None
        if config.position is Position.rope:
            dtype = layer_config.params_dtype
            self.rotary = rotary_table(config, sequence_length=sequence_length, dtype=dtype)
            self.local_rotary = local_rotary_table(config, sequence_length=sequence_length, dtype=dtype)

    @classmethod
    def stack(cls, config: ModelConfig) -> ModuleSpec:
        """The layers."""
        return transformer_stack(config, cls.mask)

    @classmethod
    def pattern(cls, config: ModelConfig, layout: ParallelConfig) -> str:
        """Which of them stand where, chunk by chunk of the pipeline."""
        chunks = layout.pipeline * layout.virtual_pipeline
        return layer_pattern(config, layout.pipeline_split or [config.layers // chunks] * chunks)

    def forward(self, batch: dict[str, Tensor]) -> Tensor | tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A batch (INTERFACES, cut by `ContextParallel.cut`), on the CPU or the device: `tokens` and `positions`
        [batch, sequence / context], `document_ids` and, of prefix LM, `prefix` [batch, sequence]; in training with
        dropout `sample_ids`, with experts `loss_weights` and `loss_factor`.

        Returns:
            On the last chunk what `predict` gives; or `losses`, if these are computed here and the batch says by a
            `loss_factor` that nobody asks for more; else hidden states
            [sequence / context (/ tensor under sequence parallelism), batch, hidden].
        """
        context = self.context(batch)
        hidden = self.embed(batch, context) if self.pre_process else None
        if hidden is not None and not hidden.requires_grad and self.config.recompute_granularity == "full":
            hidden.requires_grad_()  # of a frozen embedding: blocks that recompute pass no gradients back without one
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=context)
        if not self.post_process:
            return hidden
        if self.cross_entropy is not None and "loss_factor" in batch:
            return self.losses(hidden, batch)
        return self.predict(hidden)

    def embed(self, batch: dict[str, Tensor], context: LayerContext) -> Tensor:
        """Hidden states [own, batch, hidden] (`LayerContext`) of a batch's tokens."""
        device = self.topology.device
        tokens = batch["tokens"].to(device, non_blocking=True)
        hidden = self.embedding(input_ids=tokens, position_ids=batch["positions"].to(device, non_blocking=True))
        if self.description.scale_embeddings:
            hidden = hidden * self.description.hidden_size**0.5
        return self.dropped(hidden, context)

    def dropped(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """Embedded tokens, some elements dropped."""
        if context.dropout_keys is None or not self.description.dropout:
            return hidden
        return drop(hidden, context.dropout_keys, stream=0, share=self.description.dropout)

    def predict(self, hidden: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Of what the last block gives the logits, first: [sequence / context, batch, vocabulary / tensor], or of all
        classes."""
        if self.classifier is not None:
            return self.classifier(hidden)
        assert self.output_layer is not None
        products, _ = self.output_layer(hidden, weight=self._tied())
        return self._logit_form()(products)

    def predict_in_chunks(self, *, z_loss: float) -> None:
        """From now on the cross-entropy that training minimises is computed here, and all logits are never there.

        A plugin's chunk that predicts in its own way, and does not say what `losses` are then, stays as it is.
        """
        if self.post_process and self.classifier is None and _defines(type(self), "losses", "predict"):
            self.cross_entropy = ChunkedCrossEntropy(topology=self.topology, z_loss=z_loss)
            self.output_layer.forward = partial(_lent, self.output_layer, self.output_layer.forward)

    def losses(
        self, hidden: Tensor, batch: dict[str, Tensor], *, bias: Tensor | None = None
    ) -> TokenLosses | tuple[Any, ...]:
        """Of what the last block gives the cross-entropy of a batch's labels; `bias` is added to the logits."""
        assert self.cross_entropy is not None
        compute = partial(self.cross_entropy, batch=batch, form=self._logit_form(), bias=bias)
        return self.output_layer(hidden, weight=self._tied(), use=compute)

    def _tied(self) -> Tensor | None:
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _logit_form(self) -> LogitForm:
        return LogitForm(factor=self.logit_factor, cap=self.description.logit_softcap)

    def sharded_state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """megatron-core's, which looks for an output layer on the last stage."""
        last, self.post_process = self.post_process, self.post_process and self.classifier is None
        try:
            return super().sharded_state_dict(*arguments, **options)
        finally:
            self.post_process = last

    def context(self, batch: dict[str, Tensor]) -> LayerContext:
        """What the layers are to know of a batch's tokens."""
        device, held = self.topology.device, self.topology.context
        keys = all_keys = weights = None
        positions = batch["positions"].to(device, non_blocking=True)
        rotation, local = (None if table is None else table(positions) for table in (self.rotary, self.local_rotary))
        sequence = batch["document_ids"].shape[1]
        if self.training and (self.description.dropout or self.description.lora.dropout):
            places = held.part(torch.arange(sequence, device=device))
            all_keys = token_keys(self.seed, batch["sample_ids"].to(device, non_blocking=True), places)
            keys = self.own(all_keys)
        if self.training and self.description.moe.experts:
            weights = self.own(batch["loss_weights"].to(device, non_blocking=True).T)
        return LayerContext(
            rotation=rotation,
            local_rotation=local,
            pieces=find_pieces(
                batch["document_ids"].cpu(),
                held.chunks(sequence),
                causal=self.mask is AttnMaskType.causal,
                prefix=batch["prefix"].cpu() if "prefix" in batch else None,
            ),
            dropout_keys=keys,
            all_dropout_keys=all_keys,
            weights=weights,
            loss_factor=batch.get("loss_factor"),
        )

    def own(self, tokens: Tensor) -> Tensor:
        """Of [sequence, batch] what this tensor rank holds between the matrices."""
        if not self.topology.sequence_parallel:
            return tokens
        return tokens.chunk(self.topology.config.tensor)[self.topology.tensor_rank]

    def take_sums(self) -> Tensor | None:
        """What this chunk adds up over a step beside the loss, of one shape on all ranks; None if nothing."""
        moe = self.description.moe
        if not moe.experts:
            return None
        return take_sums(self, layers=self.description.layers, experts=moe.experts, device=self.topology.device)

    @staticmethod
    def metrics(sums: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """From `take_sums`, added up over all chunks and ranks, and the batch's weight: what a step reports."""
        return summary(sums, weight)


def _lent(
    module: Any,
    multiplied: Callable[..., Any],
    hidden: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
    *,
    use: Callable[[Tensor, Tensor], Any] | None = None,
) -> Any:
    """The forward of an output layer that also lends its matrix, which ZeRO-3 gathers for a module's forward alone."""
    if use is None:
        return multiplied(hidden, weight, runtime_gather_output)
    return use(hidden, module.weight if weight is None else weight)


def _defines(kind: type, *names: str) -> bool:
    """Whether one class defines all of the methods as the kind has them."""
    return len({next(each for each in kind.__mro__ if name in vars(each)) for name in names}) == 1
