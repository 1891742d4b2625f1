"""Mixture of experts: the router, its losses and what it reports; dispatch and experts are megatron-core's.

The idea: every number here is defined per sample and weighed by tokens, so that no layout, micro-batch or padding
changes it. With w_t the loss weight of token t of a sample of weight T, the load-balancing loss of a sample is

    E x sum over experts e of (share of choices that fell on e) x (mean score of e)        both weighted by w

(Fedus et al., 2021, arXiv:2101.03961, eq. 4, taken per sequence as in DeepSeek-V3, arXiv:2412.19437), and the loss of
a batch is its token-weighted mean over samples, coefficient in front, added for each layer. The z-loss is the
token-weighted mean of squared log-sum-exps (Zoph et al., 2022, arXiv:2202.08906).

The load of an expert bias is counted the same way, so its gradient is that of every layout too.

megatron-core's own router defines both per micro-batch and in float32; its results would change with the layout.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import linear

from model.config import MoeConfig, RouterScore
from model.layer_context import LayerContext

_TINY = 1e-20
"""Added to a sum of sigmoids before it divides."""


class _Attach(torch.autograd.Function):
    """Adds a loss to those that the backward pass differentiates, by way of a tensor that it reaches anyway."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor.to(loss.dtype))
        return carrier

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0], factor, None


class Router(MegatronModule):
    """Sends each token to its top experts; computes in float32 (float64 in float64)."""

    tokens: LayerContext
    """Handed over by the block before each forward pass."""

    def __init__(
        self,
        *,
        config: TransformerConfig,
        description: MoeConfig,
        pg_collection: ProcessGroupCollection | None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config)
        assert pg_collection is not None
        self.description = description
        self.experts = description.experts
        self.group = pg_collection.tp_cp
        self.layer_number = 0
        self.weight = torch.nn.Parameter(torch.empty(self.experts, config.hidden_size, dtype=config.params_dtype))
        self.bias = None
        if description.expert_bias:
            self.bias = torch.nn.Parameter(torch.zeros(self.experts, dtype=config.params_dtype))
        self.sums: Tensor | None = None
        """[experts + 2] float64 since the last step: tokens of each expert, load-balancing loss, z-loss."""

    def set_layer_number(self, layer_number: int) -> None:
        """Called by megatron-core; counted from 1."""
        self.layer_number = layer_number

    def forward(self, hidden: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:
        """[sequence, batch, hidden] -> the chosen experts' weights and the choice, each [sequence x batch, experts]."""
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logits = linear(hidden.to(dtype), self._read(self.weight).to(dtype))  # [sequence, batch, experts]
        sigmoid = self.description.score is RouterScore.sigmoid
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
        chosen = self._chosen(logits, scores.detach())
        shares = scores.gather(-1, chosen)
        if self.description.normalise_top_k:
            top = logits.gather(-1, chosen)
            shares = shares / (shares.sum(dim=-1, keepdim=True) + _TINY) if sigmoid else top.softmax(dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, shares * self.description.scale)
        choice = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
        if sigmoid:
            scores = scores / scores.sum(dim=-1, keepdim=True)
        if self.training and torch.is_grad_enabled():
            loss = self._losses(logits, scores, choice)
            weights = _Attach.apply(weights, loss, self.tokens.loss_factor)
        return weights.flatten(0, 1), choice.flatten(0, 1)

    def _read(self, parameter: Tensor) -> Tensor:
        """What each tensor rank applies to its own tokens, so that the gradient is a sum over them."""
        return copy_to_tensor_model_parallel_region(parameter) if self.config.sequence_parallel else parameter

    @torch.no_grad()
    def _chosen(self, logits: Tensor, scores: Tensor) -> Tensor:
        """[sequence, batch, top_k] numbers of experts."""
        groups, preferred = self.description.groups, logits
        if self.bias is not None:
            preferred = scores + self.bias.to(scores.dtype)
        if groups > 1:
            preferred = preferred if self.bias is not None else scores
            by_group = preferred.unflatten(-1, (groups, -1))  # [sequence, batch, groups, experts of one]
            best = by_group.topk(self.description.group_experts, dim=-1).values.sum(dim=-1)
            groups_chosen = best.topk(self.description.top_groups, dim=-1).indices
            closed = torch.ones_like(best, dtype=torch.bool).scatter(-1, groups_chosen, False)
            preferred = by_group.masked_fill(closed[..., None], -torch.inf).flatten(-2)
        return preferred.topk(self.description.top_k, dim=-1).indices

    def _losses(self, logits: Tensor, scores: Tensor, choice: Tensor) -> Tensor:
        """The auxiliary losses of the micro-batch [], summed over tokens; adds to what the step reports."""
        assert self.tokens.weights is not None
        weights = self.tokens.weights.to(scores.dtype)[..., None]  # [sequence, batch, 1]
        chosen = (choice * weights).sum(dim=0)  # [batch, experts]
        counts = torch.cat((chosen, weights.sum(dim=0)), dim=-1)
        dist.all_reduce(counts, group=self.group)
        score_sums = reduce_from_tensor_model_parallel_region((scores * weights).sum(dim=0), group=self.group)
        per_sample = (counts[:, :-1] * score_sums).sum(dim=-1) / counts[:, -1].clamp(min=1e-12)
        even = self.experts / self.description.top_k
        balance = per_sample.sum() * even
        z = (logits.logsumexp(dim=-1, keepdim=True).square() * weights).sum()
        self._remember(chosen, balance / self.group.size(), z)
        loss = self.description.load_balance_loss * balance + self.description.z_loss * z
        if self.bias is None:
            return loss
        beyond = ((choice * even - 1) * weights).sum(dim=(0, 1))  # [experts]: tokens beyond an even share
        return loss + self.description.bias_loss * (self._read(self.bias).to(beyond.dtype) @ beyond)

    @torch.no_grad()
    def _remember(self, chosen: Tensor, balance: Tensor, z: Tensor) -> None:
        found = torch.cat((chosen.sum(dim=0), torch.stack((balance, z)))).double()
        self.sums = found if self.sums is None else self.sums + found


def mixture(linears: MLPSubmodules, description: MoeConfig) -> partial[MoELayer]:
    """megatron-core's mixture with our router, for a layer's MLP slot."""
    return partial(
        MoELayer,
        submodules=MoESubmodules(
            router=partial(Router, description=description),
            experts=partial(SequentialMLP, submodules=linears),
            shared_experts=partial(SharedExpertMLP, submodules=linears),
        ),
    )


def take_sums(chunk: torch.nn.Module, *, layers: int, experts: int, device: torch.device) -> Tensor:
    """What this rank's routers saw since the last call, [layers, experts + 2] float64; zero for layers elsewhere."""
    sums = torch.zeros(layers, experts + 2, dtype=torch.float64, device=device)
    for router in (module for module in chunk.modules() if isinstance(module, Router)):
        if router.sums is not None:
            sums[router.layer_number - 1] = router.sums
            router.sums = None
    return sums


def summary(sums: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """What a step reports of its routers: from [layers, experts + 2] summed over all ranks, and the batch's weight.

    `load_balance_loss` is 1 for an even spread and `experts` for the worst (mean over layers, without coefficient);
    `router_load.LAYER`, from 1, is the largest share of a layer's tokens that one expert got, times the number of
    experts; `busiest_expert` is the largest of these.
    """
    (layers,) = (sums[:, :-2].sum(dim=1) > 0).nonzero(as_tuple=True)
    if not len(layers):
        return {}
    sums = sums[layers]
    tokens = sums[:, :-2]
    loads = tokens.amax(dim=1) / tokens.mean(dim=1)
    means = sums[:, -2:].mean(dim=0) / weight.clamp(min=1e-12)
    by_layer = {f"router_load.{layer + 1}": load for layer, load in zip(layers.tolist(), loads, strict=True)}
    return {"load_balance_loss": means[0], "router_z_loss": means[1], "busiest_expert": loads.amax(), **by_layer}
