"""What training minimises: functions of a model's outputs and a batch, summed, to be divided once, globally.

An objective returns (loss_sum, weight_sum, {name: summed value}); the engine adds them up over micro-batches and
data-parallel slices and divides a single time, so that the result does not depend on how the batch was cut.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits whose vocabulary is cut over the ranks of a group, in the logits' own precision.

    megatron-core's computes in float32 whatever it is given, which hides errors below 1e-8 from a float64 proof.
    Source: Shoeybi et al., 2019, arXiv:1909.08053, section 3.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup) -> Tensor:
        """Logits [..., vocabulary / group], global labels [...] -> losses [...]."""
        share = logits.shape[-1]
        largest = logits.amax(dim=-1)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        exponentials = (logits - largest[..., None]).exp_()
        local = labels - group.rank() * share
        elsewhere = (local < 0) | (local >= share)
        local = local.masked_fill(elsewhere, 0)[..., None]
        ours = (logits.gather(-1, local)[..., 0] - largest).masked_fill(elsewhere, 0)
        sums = torch.stack((exponentials.sum(dim=-1), ours))
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(exponentials.div_(sums[0, ..., None]), local, elsewhere)
        return sums[0].log() - sums[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Softmax minus the one-hot label, times the gradient of the loss."""
        probabilities, local, elsewhere = ctx.saved_tensors
        probabilities.scatter_add_(-1, local, -(~elsewhere)[..., None].to(probabilities.dtype))
        return probabilities.mul_(gradients[0][..., None]), None, None


def token_losses(logits: Tensor, labels: Tensor, tensor_group: ProcessGroup) -> Tensor:
    """Cross-entropy of each token in nats, float32 (float64 for float64 logits).

    Args:
        logits: [sequence, batch, vocabulary / tensor], the vocabulary cut over `tensor_group`.
        labels: [sequence, batch], global token ids.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if tensor_group.size() > 1:
        return _VocabularyParallelCrossEntropy.apply(logits, labels, tensor_group)
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def causal_language_modelling(
    logits: Tensor, batch: Mapping[str, Tensor], tensor_group: ProcessGroup
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Next-token prediction: the weighted sum of the token losses, and the sum of the weights."""
    labels = batch["labels"].to(logits.device, non_blocking=True).T.contiguous()
    weights = batch["loss_weights"].to(logits.device, non_blocking=True).T
    losses = token_losses(logits, labels, tensor_group)
    return (losses * weights).sum(), weights.sum(), {}
