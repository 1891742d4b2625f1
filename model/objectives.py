"""What training minimises: functions of a model's outputs and a batch, summed, to be divided once, globally.

An objective returns (loss_sum, weight_sum, {name: summed value}); the engine adds them up over micro-batches and
data-parallel slices and divides a single time, so that the result does not depend on how the batch was cut.
"""

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy


def token_losses(logits: Tensor, labels: Tensor, tensor_group: ProcessGroup) -> Tensor:
    """Cross-entropy of each token in nats, float32 (float64 for float64 logits).

    Args:
        logits: [sequence, batch, vocabulary / tensor], the vocabulary cut over `tensor_group`.
        labels: [sequence, batch], global token ids.
    """
    if tensor_group.size() > 1:
        return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), labels, tp_group=tensor_group)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def causal_language_modelling(
    logits: Tensor, batch: dict[str, Tensor], tensor_group: ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Next-token prediction: the weighted sum of the token losses, and the sum of the weights."""
    labels = batch["labels"].to(logits.device, non_blocking=True).T.contiguous()
    weights = batch["loss_weights"].to(logits.device, non_blocking=True).T
    losses = token_losses(logits, labels, tensor_group)
    return (losses * weights).sum(), weights.sum(), {}
