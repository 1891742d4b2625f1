"""Log-likelihoods of given tokens, and classes of given texts, from the live model in whatever layout it has.

One mechanism serves multiple choice, sliding windows and the harness: rows of ids, each with the places whose labels
are asked for; every rank gets all rows, takes its share, and all know all answers in the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import rows_per_rank
from launcher.assemble import make_engine
from launcher.config import RunConfig
from launcher.places import Checkpoint
from model.objectives import token_losses
from parallel.checkpoint.load import load
from parallel.engine import Batch, Engine
from parallel.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What a model reads and what is asked of it."""

    ids: Sequence[int]
    """All tokens; of a causal model the first is never predicted."""
    asked: range
    """Places in `ids` whose tokens are predicted, 1 or later; of a head for classes the one that is read."""


class Answers:
    """An objective that keeps, for each row, the summed loss of what is asked, how many tokens were not the likeliest,
    and for classes which one is."""

    reports = ()

    def __init__(self, rows: int, topology: Topology, *, classes: bool = False) -> None:
        self._topology = topology
        self._classes = classes
        self.found = torch.zeros(rows, 2, dtype=torch.float64, device=topology.device)

    def __call__(self, logits: Tensor, batch: Batch, tensor_group: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As every objective; the batch's `sample_ids` number the rows, -1 in those that only fill."""
        weights = batch["loss_weights"].to(logits.device).T.double()  # [sequence, batch]
        labels = batch["labels"].to(logits.device).T.contiguous()
        if self._classes:
            losses, wrong = torch.zeros_like(weights), logits.argmax(dim=-1).double()
        else:
            losses = token_losses(logits, labels, tensor_group).double()
            wrong = _not_likeliest(logits, labels, tensor_group).double()
        rows = torch.stack(((losses * weights).sum(dim=0), (wrong * weights).sum(dim=0)), dim=1)  # [batch, 2]
        places = batch["sample_ids"].to(logits.device)
        self.found.index_add_(0, places.clamp(min=0), rows.where((places >= 0)[:, None], 0))
        return losses.sum(), weights.sum(), {}

    def over_all_ranks(self) -> Tensor:
        """[rows, 2] on every rank; of those that hold the same logits, one contributes."""
        mine = self._topology.tensor_rank == 0 and self._topology.is_last_pipeline_stage
        sums = self.found.clone() if mine else torch.zeros_like(self.found)
        dist.all_reduce(sums)
        return sums.cpu()


def _not_likeliest(logits: Tensor, labels: Tensor, tensor_group: Any) -> Tensor:
    """Whether some token is likelier than the label; logits [sequence, batch, vocabulary / tensor]."""
    share = logits.shape[-1]
    local = labels - tensor_group.rank() * share
    ours = (local >= 0) & (local < share)
    of_label = logits.gather(-1, local.clamp(0, share - 1)[..., None])[..., 0].masked_fill(~ours, float("-inf"))
    both = torch.stack((logits.amax(dim=-1), of_label)).float()
    dist.all_reduce(both, op=dist.ReduceOp.MAX, group=tensor_group)
    return both[0] > both[1]


class Scorer:
    """A checkpoint that says how likely texts are."""

    def __init__(self, checkpoint: Checkpoint, config: RunConfig, *, vocabulary_size: int, padding: int) -> None:
        """Loads the model in the layout of `config`; every rank calls this."""
        self.config = config
        self.padding = padding
        self.topology = Topology.create(config.parallel)
        self.length = config.train.sequence_length
        self._asked: Any = None
        self.engine: Engine = make_engine(
            config, vocabulary_size=vocabulary_size, topology=self.topology, objective=self
        )
        load(checkpoint.path, {"model": self.engine.participants()["model"]})

    reports = ()

    def __call__(self, *arguments: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The objective of the question at hand."""
        return self._asked(*arguments)

    def scores(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of what is asked of each row, and whether each token of it is the likeliest; every
        rank calls this with the same rows. A row that is too long loses its beginning."""
        return [(-loss, wrong == 0) for loss, wrong in self._answers(rows, classes=False).tolist()]

    def classes(self, rows: Sequence[Row]) -> list[int]:
        """The class at the place that is asked for, of each row; likewise."""
        return [int(found) for _, found in self._answers(rows, classes=True).tolist()]

    def _answers(self, rows: Sequence[Row], *, classes: bool) -> Tensor:
        self._asked = Answers(len(rows), self.topology, classes=classes)
        train, topology = self.config.train, self.topology
        own = rows_per_rank(train.global_batch_size, train.micro_batch_size, topology.data_parallel_size)
        for first in range(0, len(rows), train.global_batch_size):
            slots = range(topology.data_parallel_rank * own, (topology.data_parallel_rank + 1) * own)
            last = min(len(rows) - first, train.global_batch_size)
            chosen = [first + slot if slot < last else -1 for slot in slots]
            self.engine.evaluate(self._batch(rows, chosen, shift=0 if classes else 1))
        return self._asked.over_all_ranks()

    def _batch(self, rows: Sequence[Row], chosen: Sequence[int], *, shift: int) -> dict[str, Tensor]:
        shape = (len(chosen), self.length)
        tokens, labels = (torch.full(shape, self.padding) for _ in range(2))
        weights, documents = torch.zeros(shape), torch.ones(shape, dtype=torch.int32)
        positions = torch.arange(self.length).repeat(len(chosen), 1)
        for place, number in enumerate(chosen):
            if number < 0:
                continue
            ids, asked = rows[number].ids, rows[number].asked
            cut = max(0, len(ids) - shift - self.length)
            read = torch.tensor(ids[cut:])
            count = len(read) - shift
            tokens[place, :count] = read[:count]
            labels[place, :count] = read[shift:]
            weights[place, max(0, asked.start - cut - shift) : max(0, asked.stop - cut - shift)] = 1
            documents[place, :count] = 0
            positions[place, count:] -= count
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_weights": weights,
            "positions": positions,
            "document_ids": documents,
            "sample_ids": torch.tensor(chosen),
        }


def windows(ids: Sequence[int], length: int, stride: int) -> list[Row]:
    """A long document as rows, every token but the first asked for once, with at least `length - stride` before it
    where the document has so many.

    Args:
        ids: the document.
        length: labels of a row.
        stride: labels that a row asks for, at most `length`; the first one asks for all of its.
    """
    rows = [Row(ids=ids[: length + 1], asked=range(1, min(len(ids), length + 1)))]
    done = rows[0].asked.stop
    while done < len(ids):
        stop = min(done + stride, len(ids))
        first = max(0, stop - length - 1)
        rows.append(Row(ids=ids[first:stop], asked=range(done - first, stop - first)))
        done = stop
    return rows
