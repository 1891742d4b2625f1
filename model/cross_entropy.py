"""Cross-entropy of predicted tokens, from logits, or from hidden states without ever holding all logits.

The idea: the output layer and the cross-entropy are taken some rows at a time, and each chunk's gradient is made at
once, while its probabilities are there. Kept for the backward pass are the gradients of hidden states and of the matrix
instead of [tokens, vocabulary] probabilities in float32; the exponential is taken once instead of twice; and rows that
do not count (all but the covered ones of a masked language model) are not multiplied at all. It works because the loss
is a weighted sum, so that what is not known yet of a gradient is one factor.

The trade-off: each chunk adds to the matrix's whole gradient, which costs memory traffic; chunks are as large as
`model.size.logit_rows` allows.

Under tensor parallelism each rank has a part of the vocabulary; two sums of a chunk's rows go over the group.

Sources: vocabulary-parallel cross-entropy: Shoeybi et al., 2019, arXiv:1909.08053, section 3; gradients in the forward
pass: Hsu et al., 2024, arXiv:2410.10989 (Liger), section 3.2; z-loss: Chowdhery et al., 2022, arXiv:2204.02311, 5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from model.size import logit_rows
from parallel.precision import exact
from parallel.topology import Topology


class TokenLosses(NamedTuple):
    """What a batch's tokens cost in nats, each times its weight."""

    total: Tensor
    """[] the sum, in training with the z-loss; all that has a gradient."""
    losses: Tensor
    """[sequence, batch]"""
    squares: Tensor
    """[] the sum of the squared log-normalisers."""


class _VocabularyParallel(torch.autograd.Function):
    """Cross-entropy and log-normaliser of logits whose vocabulary is cut over the ranks of a group, in the logits' own
    precision.

    megatron-core's computes in float32 whatever it is given, which hides errors below 1e-8 from a float64 proof.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: ProcessGroup, normalised: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits [..., vocabulary / group], global labels [...] -> losses [...], log-normalisers [...]; these are
        differentiable if `normalised`."""
        ctx.normalised = normalised
        exponentials = logits.clone()
        largest, local, sums = _exponentials(exponentials, labels, group)
        ctx.save_for_backward(exponentials.div_(sums[0, ..., None]), *local)
        logarithms = sums[0].log()
        return logarithms - sums[1], logarithms + largest

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Softmax times both gradients, minus the one-hot label times that of the loss."""
        probabilities, place, elsewhere = ctx.saved_tensors
        of_loss, of_normaliser = gradients
        more = probabilities * of_normaliser[..., None] if ctx.normalised else None
        probabilities.scatter_add_(-1, place, -(~elsewhere)[..., None].to(probabilities.dtype))
        probabilities.mul_(of_loss[..., None])
        return (probabilities if more is None else probabilities.add_(more)), None, None, None


def _exponentials(
    logits: Tensor, labels: Tensor, group: ProcessGroup | None
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Logits [..., vocabulary / group] become exp(logit - the row's largest).

    Returns:
        The largest, [...]; where each label stands here, [..., 1], and whether that is on another rank, [...]; the sum
        of the exponentials and the label's logit less the largest, [2, ...].
    """
    share = logits.shape[-1]
    largest = logits.amax(dim=-1)
    if group is None:
        place, elsewhere = labels, torch.zeros_like(labels, dtype=torch.bool)
    else:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        place = labels - group.rank() * share
        elsewhere = (place < 0) | (place >= share)
        place = place.masked_fill(elsewhere, 0)
    place = place[..., None]
    logits.sub_(largest[..., None])
    of_label = logits.gather(-1, place)[..., 0].masked_fill(elsewhere, 0)
    sums = torch.stack((logits.exp_().sum(dim=-1), of_label))
    if group is not None:
        dist.all_reduce(sums, group=group)
    return largest, (place, elsewhere), sums


def token_losses(logits: Tensor, labels: Tensor, tensor_group: ProcessGroup | None) -> Tensor:
    """Cross-entropy of each token in nats, float32 (float64 for float64 logits).

    Args:
        logits: [sequence, batch, vocabulary / tensor], the vocabulary cut over `tensor_group`; None: it is whole.
        labels: [sequence, batch], global token ids.
    """
    if tensor_group is not None and tensor_group.size() > 1:
        return _VocabularyParallel.apply(exact(logits), labels, tensor_group, False)[0]
    return cross_entropy(exact(logits).flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def weighted_losses(
    logits: Tensor, batch: Mapping[str, Tensor], tensor_group: ProcessGroup | None, *, z_loss: float = 0.0
) -> TokenLosses:
    """Of logits [sequence, batch, vocabulary / tensor]; without gradients there is no z-loss, so that an evaluation
    says what the model predicts."""
    labels, weights = labels_of(batch, logits.device)
    if not z_loss:
        losses = token_losses(logits, labels, tensor_group) * weights
        total = losses.sum()
        return TokenLosses(total, losses.detach(), torch.zeros_like(total))
    if tensor_group is not None and tensor_group.size() > 1:
        found, normalisers = _VocabularyParallel.apply(exact(logits), labels, tensor_group, True)
    else:
        found, normalisers = token_losses(logits, labels, tensor_group), exact(logits).logsumexp(dim=-1)
    losses, squares = found * weights, (normalisers.square() * weights).sum()
    total = losses.sum()
    if torch.is_grad_enabled():
        total = total + z_loss * squares
    return TokenLosses(total, losses.detach(), squares.detach())


def labels_of(batch: Mapping[str, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels and their weights, [sequence, batch] each."""
    labels = batch["labels"].to(device, non_blocking=True).T.contiguous()
    return labels, batch["loss_weights"].to(device, non_blocking=True).T


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitForm:
    """What makes logits of products of hidden states and the output matrix."""

    factor: float = 1.0
    cap: float | None = None
    """Logits x become cap x tanh(x / cap)."""

    def __call__(self, products: Tensor) -> Tensor:
        """[..., vocabulary / tensor]"""
        logits = products if self.factor == 1 else products * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What all chunks share."""

    form: LogitForm
    z_loss: float
    group: ProcessGroup | None
    labels: Tensor
    """[rows]"""
    weights: Tensor
    """[rows]"""
    scale: Tensor
    """[] what the total will be multiplied by before it is differentiated: gradients are rounded at that size."""

    def chunks(self, hidden: Tensor, matrix: Tensor) -> list[slice]:
        rows = logit_rows(len(matrix), hidden.device.type)
        return [slice(begin, begin + rows) for begin in range(0, len(hidden), rows)]

    def of(self, products: Tensor, bias: Tensor | None, rows: slice, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
        """Losses and squared log-normalisers [2, chunk], weighted, of a chunk's products; these, in `exact`, are
        overwritten, with the gradient of the logits before the bias where it is asked for. Second the gradient of the
        bias, if there is one."""
        labels, weights, slope = self.labels[rows], self.weights[rows], None
        if self.form.factor != 1:
            products.mul_(self.form.factor)
        if self.form.cap is not None:
            bent = products.div_(self.form.cap).tanh_()
            slope = 1 - bent.square() if gradient else None
            products.mul_(self.form.cap)
        if bias is not None:
            products.add_(bias)
        largest, (place, elsewhere), sums = _exponentials(products, labels, self.group)
        logarithms = sums[0].log()
        normalisers = logarithms + largest
        found = torch.stack((logarithms - sums[1], normalisers.square())) * weights
        if not gradient:
            return found, None
        of_loss = weights * self.scale
        products.mul_((of_loss * (1 + 2 * self.z_loss * normalisers) / sums[0])[:, None])
        products.scatter_add_(-1, place, -of_loss.masked_fill(elsewhere, 0)[:, None])
        of_bias = None if bias is None else products.sum(dim=0)
        if slope is not None:
            products.mul_(slope)
        if self.form.factor != 1:
            products.mul_(self.form.factor)
        return found, of_bias


class _InChunks(torch.autograd.Function):
    """The total, and what is reported beside it, of rows of hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, bias: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [rows, hidden], matrix [vocabulary / tensor, hidden], bias [vocabulary / tensor] -> total [],
        weighted losses [rows], sum of squared log-normalisers []."""
        wanted, chunks = any(ctx.needs_input_grad), work.chunks(hidden, matrix)
        precision = torch.promote_types(matrix.dtype, torch.float32)
        summed = precision if len(chunks) > 1 else matrix.dtype
        found = hidden.new_empty((2, len(hidden)), dtype=precision)
        of_hidden = torch.empty_like(hidden) if wanted else None
        of_matrix = torch.zeros_like(matrix, dtype=summed) if ctx.needs_input_grad[1] else None
        of_bias = None if bias is None or not wanted else torch.zeros_like(bias, dtype=precision)
        for rows in chunks:
            logits = exact(hidden[rows] @ matrix.T)
            found[:, rows], over_rows = work.of(logits, bias, rows, gradient=wanted)
            if of_hidden is None:
                continue
            logits = logits.to(matrix.dtype)
            torch.mm(logits, matrix, out=of_hidden[rows])
            if of_matrix is not None:
                _add_product(of_matrix, logits.T, hidden[rows])
            if of_bias is not None and over_rows is not None:
                of_bias += over_rows
        ctx.scale = work.scale
        ctx.save_for_backward(of_hidden, of_matrix, of_bias)
        losses, squares = found[0], found[1].sum()
        total = losses.sum()
        ctx.mark_non_differentiable(losses, squares)
        return (total + work.z_loss * squares if work.z_loss and wanted else total), losses, squares

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the total, the only one that has a gradient."""
        rest = gradients[0] / ctx.scale  # 1, where the batch told by what the total is going to be multiplied
        hidden, matrix, bias = (None if each is None else each * rest for each in ctx.saved_tensors)
        return hidden, matrix, bias, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds a product of matrices in a two-byte format to a sum in float32, or as they are."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _counted(weights: Tensor) -> Tensor:
    """Which tokens of [batch, sequence] count, by their places in [sequence, batch]; of a batch on the CPU, where its
    loader put it, no device is asked."""
    return weights.T.flatten().nonzero()[:, 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkedCrossEntropy:
    """The cross-entropy of an output layer's logits, in chunks of rows; the same numbers as `weighted_losses`."""

    topology: Topology
    z_loss: float = 0.0

    def __call__(
        self, hidden: Tensor, matrix: Tensor, batch: Mapping[str, Tensor], *, form: LogitForm, bias: Tensor | None
    ) -> TokenLosses:
        """Of hidden states [own, batch, hidden], a matrix [vocabulary / tensor, hidden] and what is added to logits,
        [vocabulary / tensor]; of a batch its `labels`, `loss_weights` and, if it has one, `loss_factor`, by which the
        total is going to be multiplied."""
        topology = self.topology
        group = topology.groups.tp if topology.config.tensor > 1 else None
        if topology.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        elif group is not None:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        labels, weights = (each.flatten() for each in labels_of(batch, hidden.device))
        rows, shape = hidden.flatten(0, 1), hidden.shape[:2]
        counted = _counted(batch["loss_weights"])
        some = len(counted) < len(rows)
        if some:
            if hidden.is_cuda:  # from other memory a copy waits for all that the device has to do
                counted = counted.pin_memory()
            counted = counted.to(hidden.device, non_blocking=True)
            rows, labels, weights = (each.index_select(0, counted) for each in (rows, labels, weights))
        precision = torch.promote_types(matrix.dtype, torch.float32)
        work = _Work(
            form=form,
            z_loss=self.z_loss,
            group=group,
            labels=labels,
            weights=weights.to(precision),
            scale=batch.get("loss_factor", torch.ones((), device=rows.device)).to(precision),
        )
        total, losses, squares = _InChunks.apply(rows, matrix, bias, work)
        if some:
            losses = losses.new_zeros(shape.numel()).index_copy_(0, counted, losses)
        return TokenLosses(total, losses.view(shape), squares)
