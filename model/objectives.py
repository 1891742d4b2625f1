"""What training minimises: functions of a model's outputs and a batch, summed, to be divided once, globally.

An objective returns (loss_sum, weight_sum, {name: [summed value, summed weight]}); the engine adds them up over
micro-batches and data-parallel slices and divides a single time, so that the result does not depend on how the batch
was cut. `objective` makes one by its name; `samples` of model/families.py says which form of sample it is for.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from model import families
from model.config import ObjectiveName
from model.cross_entropy import TokenLosses, weighted_losses
from model.families import Architecture
from parallel.engine import Objective
from parallel.precision import exact


class Prediction:
    """Cross-entropy of every token whose weight is not 0, and in training the z-loss.

    The z-loss is the squared log-normaliser of each predicted token (Chowdhery et al., 2022, arXiv:2204.02311, section
    5); it is a part of the loss only where there are gradients, so that an evaluation says what the model predicts.
    """

    def __init__(self, *, z_loss: float = 0.0, sources: Sequence[str] = ()) -> None:
        """With `sources` it reports the cross-entropy of each; the batch then says of each row which one it is of."""
        self.z_loss = z_loss
        self._sources = len(sources)
        self._by_source = [f"loss_by_source.{name}" for name in sources]
        self.reports: Sequence[str] = (*(("z_loss",) if z_loss else ()), *self._by_source)

    def __call__(
        self, outputs: Tensor | TokenLosses, batch: Mapping[str, Tensor], tensor_group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits [sequence, batch, vocabulary / tensor], or what a model in training makes of them -> loss sum [],
        weight sum [], what it reports."""
        found = outputs
        if not isinstance(found, TokenLosses):
            found = weighted_losses(found, batch, tensor_group, z_loss=self.z_loss)
        weights = batch["loss_weights"].to(found.losses.device, non_blocking=True).T
        reported = {"z_loss": torch.stack((found.squares, weights.sum()))} if self.z_loss else {}
        return found.total, weights.sum(), reported | self._of_sources(found.losses, weights, batch)

    @torch.no_grad()
    def _of_sources(self, losses: Tensor, weights: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weighted losses and weights [sequence, batch], added up over the rows of each source."""
        if not self._sources:
            return {}
        rows = torch.stack((losses.sum(dim=0), weights.sum(dim=0)), dim=-1).double()  # [batch, 2]
        source = batch["source"].to(losses.device, non_blocking=True)
        of_source = source == torch.arange(self._sources, device=losses.device)[:, None]  # [sources, batch]
        sums = rows.where(of_source[..., None], 0).sum(dim=1)  # a product would spread one row's NaN over all sources
        return dict(zip(self._by_source, sums, strict=True))


class MaskedPrediction:
    """`Prediction` of the covered tokens by a model that gives its logits first, and which of them were right."""

    def __init__(self, *, z_loss: float = 0.0, sources: Sequence[str] = ()) -> None:
        self._prediction = Prediction(z_loss=z_loss, sources=sources)
        self.reports: Sequence[str] = ("masked_loss", *self._prediction.reports)

    def __call__(
        self, outputs: tuple[Tensor, ...], batch: Mapping[str, Tensor], tensor_group: ProcessGroup
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(Logits [sequence, batch, vocabulary / tensor], ...) -> loss sum [], weight sum [], what it reports."""
        loss, weight, reported = self._prediction(outputs[0], batch, tensor_group)
        plain = loss
        if torch.is_grad_enabled() and "z_loss" in reported:
            plain = loss - self._prediction.z_loss * reported["z_loss"][0]
        return loss, weight, {"masked_loss": torch.stack((plain, weight)).detach(), **reported}


class MaskedPredictionAndNextSentence:
    """The mean over covered tokens plus the mean over pairs of segments, each over the whole global batch.

    The engine divides one sum by one count, that of the tokens; so the pairs' sum is brought to their scale first.
    """

    def __init__(self, *, z_loss: float = 0.0, sources: Sequence[str] = ()) -> None:
        self._masked = MaskedPrediction(z_loss=z_loss, sources=sources)
        self.reports: Sequence[str] = (*self._masked.reports, "next_sentence_loss", "next_sentence_accuracy")

    def __call__(
        self, outputs: tuple[Tensor, ...], batch: Mapping[str, Tensor], tensor_group: ProcessGroup
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(Logits, answers [batch, 2]); the batch has `next_sentence` and `next_sentence_weights`, [batch]."""
        loss, weight, reported = self._masked(outputs, batch, tensor_group)
        answers = exact(outputs[1])
        truth = batch["next_sentence"].to(answers.device, non_blocking=True)
        weights = batch["next_sentence_weights"].to(answers.device, non_blocking=True)
        pairs = (cross_entropy(answers, truth, reduction="none") * weights).sum()
        right = ((answers.argmax(dim=-1) == truth) * weights).sum()
        scale = batch["loss_weights_sum"] / batch["next_sentence_weights_sum"].clamp(min=1e-12)
        reported |= {
            "next_sentence_loss": torch.stack((pairs, weights.sum())).detach(),
            "next_sentence_accuracy": torch.stack((right, weights.sum())),
        }
        return loss + pairs * scale.to(pairs.dtype), weight, reported


class Classification:
    """`Prediction` of the classes of texts or tokens, of which every tensor rank has all logits, and how many were
    right."""

    def __init__(self, *, z_loss: float = 0.0, sources: Sequence[str] = ()) -> None:
        self._prediction = Prediction(z_loss=z_loss, sources=sources)
        self.reports: Sequence[str] = ("accuracy", *self._prediction.reports)

    def __call__(
        self, outputs: Tensor, batch: Mapping[str, Tensor], tensor_group: ProcessGroup
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits [sequence, batch, classes] -> loss sum [], weight sum [], what it reports."""
        loss, weight, reported = self._prediction(outputs, batch, None)
        labels = batch["labels"].to(outputs.device, non_blocking=True).T
        weights = batch["loss_weights"].to(outputs.device, non_blocking=True).T
        right = ((outputs.argmax(dim=-1) == labels) * weights).sum()
        return loss, weight, {"accuracy": torch.stack((right, weight)), **reported}


_MAKERS: dict[str, Callable[..., Objective]] = {
    ObjectiveName.causal_lm: Prediction,
    ObjectiveName.prefix_lm: Prediction,
    ObjectiveName.masked_lm: MaskedPrediction,
    ObjectiveName.span_corruption: Prediction,
    ObjectiveName.masked_lm_next_sentence: MaskedPredictionAndNextSentence,
    ObjectiveName.answers: Prediction,
    ObjectiveName.seq2seq: Prediction,
    ObjectiveName.classification: Classification,
}


_OF_LOSSES = {Prediction, MaskedPrediction, MaskedPredictionAndNextSentence}


def takes_losses(objective: Objective) -> bool:
    """Whether an objective is content with what `ChunkedCrossEntropy` gives in place of logits; a plugin's is not."""
    return type(objective) in _OF_LOSSES


def objective(name: str, *, z_loss: float = 0.0, sources: Sequence[str] = ()) -> Objective:
    """The objective of a name; it reports the loss of each of the store's `sources` that are given, in its order."""
    return _MAKERS[name](z_loss=z_loss, sources=sources)


def register_objective(
    name: str,
    make: Callable[..., Objective],
    *,
    samples: str = "causal",
    architecture: Architecture = Architecture.causal,
) -> None:
    """Makes `train.objective=NAME` mean an objective of your own.

    Args:
        name: the word in the configuration.
        make: called with `z_loss=` (`train.z_loss`), gives the objective, which alone says what it reports.
        samples: the form of the samples that it reads, of which a plugin may register its own.
        architecture: of the families that it can train.

    Raises:
        ValueError: the name is taken.
    """
    if name in _MAKERS:
        raise ValueError(f"there is an objective called {name} already")
    _MAKERS[name] = lambda *, z_loss, sources: make(z_loss=z_loss)
    families.SAMPLES[name], families.OWN[name] = samples, architecture
