"""Log-likelihoods of given tokens, and what a head tells of given texts, from the live model in whatever layout it has.

One mechanism serves multiple choice, sliding windows, classes, pairs of segments and the harness: rows of ids, each
with the places that are asked for; every rank gets all rows, takes its share, and all know all answers in the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import rows_per_rank
from launcher.config import RunConfig
from model.cross_entropy import token_losses
from parallel.engine import Batch, Engine
from parallel.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What a model reads and what is asked of it."""

    ids: Sequence[int]
    """All tokens; of a causal model the first is never predicted."""
    asked: Sequence[int]
    """Places in `ids`, ascending: of tokens that are predicted, 1 or later; of a head those that it is read at."""
    second: int | None = None
    """Where the second segment begins, of a pair of them."""


class _Kept:
    """An objective that adds answers up in `found`."""

    reports = ()

    def __init__(self, topology: Topology, *shape: int) -> None:
        self._topology = topology
        self.found = torch.zeros(shape, dtype=torch.float64, device=topology.device)

    def __call__(self, outputs: Any, batch: Batch, tensor_group: Any, /) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As every objective."""
        raise NotImplementedError

    def over_all_ranks(self) -> Tensor:
        """`found` on every rank; of those that hold the same logits, one contributes."""
        mine = self._topology.tensor_rank == 0 and self._topology.is_last_pipeline_stage
        sums = self.found.clone() if mine else torch.zeros_like(self.found)
        dist.all_reduce(sums)
        return sums.cpu()


class Likelihoods(_Kept):
    """Of each row the summed loss of what is asked, and how many tokens were not the likeliest: [rows, 2]."""

    def __call__(self, logits: Tensor, batch: Batch, tensor_group: Any, /) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As every objective; the batch's `sample_ids` number the rows, -1 in those that only fill."""
        weights = batch["loss_weights"].to(logits.device).T.double()  # [sequence, batch]
        labels = batch["labels"].to(logits.device).T.contiguous()
        losses = token_losses(logits, labels, tensor_group).double()
        wrong = _not_likeliest(logits, labels, tensor_group).double()
        rows = torch.stack(((losses * weights).sum(dim=0), (wrong * weights).sum(dim=0)), dim=1)  # [batch, 2]
        places = batch["sample_ids"].to(logits.device)
        self.found.index_add_(0, places.clamp(min=0), rows.where((places >= 0)[:, None], 0))
        return losses.sum(), weights.sum(), {}


class Classes(_Kept):
    """The class at each place that is asked for: [places of all rows]."""

    def __call__(self, logits: Tensor, batch: Batch, tensor_group: Any, /) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As every objective; where the batch has a weight its label is a number in `found`."""
        asked = batch["loss_weights"].to(logits.device).T > 0  # [sequence, batch]
        numbers = batch["labels"].to(logits.device).T[asked]
        self.found.index_add_(0, numbers, logits.argmax(dim=-1)[asked].double())
        return logits.new_zeros(()), asked.sum(), {}


class Follows(_Kept):
    """Whether the second segment of each row follows the first: [rows]."""

    def __call__(
        self, outputs: tuple[Tensor, Tensor], batch: Batch, tensor_group: Any, /
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As every objective; the batch has `next_sentence_weights`, and `next_sentence` is a number in `found`."""
        answers = outputs[1]  # [batch, 2]
        asked = batch["next_sentence_weights"].to(answers.device) > 0
        self.found.index_add_(
            0, batch["next_sentence"].to(answers.device)[asked], answers.argmax(dim=-1)[asked].double()
        )
        return answers.new_zeros(()), asked.sum(), {}


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
    """A model that says how likely texts are, and what its head tells."""

    def __init__(self, engine: Engine, config: RunConfig, *, padding: int) -> None:
        """Of a live model; every rank has one."""
        self.config = config
        self.padding = padding
        self.topology = engine.topology
        self.length = config.train.sequence_length
        self.engine = engine

    def scores(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of what is asked of each row, and whether each token of it is the likeliest; every
        rank calls this with the same rows. A row that is too long loses its beginning."""
        found = self._answers(rows, Likelihoods(self.topology, len(rows), 2), numbers=None)
        return [(-loss, wrong == 0) for loss, wrong in found.tolist()]

    def classes(self, rows: Sequence[Row]) -> list[list[int]]:
        """The class at each place that is asked for, row by row; likewise, but no row may be too long."""
        first = [0, *accumulate(len(row.asked) for row in rows)]
        found = self._answers(rows, Classes(self.topology, first[-1]), numbers=first).int().tolist()
        return [found[start:end] for start, end in pairwise(first)]

    def follows(self, rows: Sequence[Row]) -> list[bool]:
        """Whether the second segment of each row follows the first; likewise."""
        found = self._answers(rows, Follows(self.topology, len(rows)), numbers=range(len(rows)))
        return [value > 0 for value in found.tolist()]

    def _answers(self, rows: Sequence[Row], kept: _Kept, *, numbers: Sequence[int] | None) -> Tensor:
        """`numbers`: of the first place that is asked for, row by row, where a head is read."""
        train, topology = self.config.train, self.topology
        own = rows_per_rank(train.global_batch_size, train.micro_batch_size, topology.data_parallel_size)
        for first in range(0, len(rows), train.global_batch_size):
            slots = range(topology.data_parallel_rank * own, (topology.data_parallel_rank + 1) * own)
            last = min(len(rows) - first, train.global_batch_size)
            chosen = [first + slot if slot < last else -1 for slot in slots]
            self.engine.pulse("evaluate")
            with self.engine.asked(kept):
                self.engine.evaluate(self._batch(rows, chosen, numbers))
        return kept.over_all_ranks()

    def _batch(self, rows: Sequence[Row], chosen: Sequence[int], numbers: Sequence[int] | None) -> dict[str, Tensor]:
        shape, shift = (len(chosen), self.length), int(numbers is None)
        tokens, labels = (torch.full(shape, self.padding) for _ in range(2))
        weights, documents = torch.zeros(shape), torch.ones(shape, dtype=torch.int32)
        positions = torch.arange(self.length).repeat(len(chosen), 1)
        segments = torch.zeros(shape, dtype=torch.int64)
        for place, number in enumerate(chosen):
            if number < 0:
                continue
            row = rows[number]
            cut = max(0, len(row.ids) - shift - self.length)
            read = torch.tensor(row.ids[cut:])
            count = len(read) - shift
            asked = torch.tensor([each - cut - shift for each in row.asked if each >= cut + shift], dtype=torch.int64)
            tokens[place, :count] = read[:count]
            if numbers is None:
                labels[place, :count] = read[1:]
            else:
                labels[place, asked] = numbers[number] + torch.arange(len(asked))
            weights[place, asked] = 1
            documents[place, :count] = 0
            positions[place, count:] -= count
            segments[place, row.second : count] = int(row.second is not None)
        batch = {
            "tokens": tokens,
            "labels": labels,
            "loss_weights": weights,
            "positions": positions,
            "document_ids": documents,
            "sample_ids": torch.tensor(chosen),
        }
        if all(row.second is None for row in rows):
            return batch
        known = torch.tensor([int(number >= 0) for number in chosen])
        return batch | {
            "segment_ids": segments,
            "next_sentence": torch.tensor(chosen).clamp(min=0),
            "next_sentence_weights": known.float(),
        }


def windows(ids: Sequence[int], length: int, stride: int) -> list[Row]:
    """A long document as rows, every token but the first asked for once, with at least `length - stride` before it
    where the document has so many.

    Args:
        ids: the document.
        length: labels of a row.
        stride: labels that a row asks for, at most `length`; the first one asks for all of its.
    """
    done = min(len(ids), length + 1)
    rows = [Row(ids=ids[:done], asked=range(1, done))]
    while done < len(ids):
        stop = min(done + stride, len(ids))
        first = max(0, stop - length - 1)
        rows.append(Row(ids=ids[first:stop], asked=range(done - first, stop - first)))
        done = stop
    return rows
