"""A checkpoint on the validation documents: every token predicted once, summed by source.

Bits per byte = summed loss in bits / bytes of text. The ends of documents are predicted too: they cost bits and have no
bytes.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.store import Store
from launcher.assemble import make_engine, vocabulary_size
from launcher.evaluation import result
from launcher.evaluation.validation import validation_batches
from launcher.outcome import Outcome
from launcher.runtime import in_ranks
from launcher.verbs.evaluate import EvaluateJob
from launcher.work import Ranks
from model.cross_entropy import token_losses
from parallel.checkpoint.load import load
from parallel.common.files import write_json
from parallel.engine import Batch, Engine
from parallel.topology import Topology

logger = logging.getLogger(__name__)


class SourceLosses:
    """An objective that also keeps, for each source, the summed loss and the predicted tokens."""

    reports = ()

    def __init__(self, sources: int, topology: Topology) -> None:
        self._topology = topology
        self._sums = torch.zeros(sources, 2, dtype=torch.float64, device=topology.device)  # loss in nats, tokens

    def __call__(self, logits: Tensor, batch: Batch, tensor_group: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As every objective; `batch` has `source` besides, [batch], -1 in rows that only fill."""
        device = logits.device
        weights = batch["loss_weights"].to(device).T  # [sequence, batch]
        losses = token_losses(logits, batch["labels"].to(device).T.contiguous(), tensor_group) * weights
        rows = torch.stack((losses.sum(dim=0), weights.sum(dim=0)), dim=1).double()  # [batch, 2]
        source = batch["source"].to(device)
        self._sums.index_add_(0, source.clamp(min=0), rows * (source >= 0)[:, None])
        return losses.sum(), weights.sum(), {}

    def over_all_ranks(self) -> Tensor:
        """[sources, 2] on every rank; of those that hold the same logits, one contributes."""
        mine = self._topology.tensor_rank == 0 and self._topology.is_last_pipeline_stage
        sums = self._sums.clone() if mine else torch.zeros_like(self._sums)
        dist.all_reduce(sums)
        return sums.cpu()


def evaluate(
    engine: Engine, losses: SourceLosses, batches: Iterable[Batch], sources: tuple[str, ...]
) -> dict[str, Any]:
    """{source: (summed loss in nats, predicted tokens)}; all ranks call this together."""
    for batch in batches:
        engine.evaluate(batch)
    sums = losses.over_all_ranks().tolist()
    return {source: (nats, tokens) for source, (nats, tokens) in zip(sources, sums, strict=True) if tokens}


def work(job: EvaluateJob) -> int:
    """Joins the ranks, evaluates, writes; returns the exit code."""
    return in_ranks(lambda ranks: _evaluated(job, ranks), job.ranks)


def _evaluated(job: EvaluateJob, ranks: Ranks) -> Outcome:
    config, checkpoint = job.config, job.checkpoint
    store = Store.open(Path(config.data.store))
    topology = Topology.create(config.parallel)
    losses = SourceLosses(len(store.sources), topology)
    engine = make_engine(config, vocabulary_size=vocabulary_size(config, store), topology=topology, objective=losses)
    load(checkpoint.path, {"model": engine.participants()["model"]})
    batches = validation_batches(config, store=store, topology=topology)
    sums = evaluate(engine, losses, batches, store.sources)
    if ranks.rank == 0:
        found = result.summarise(checkpoint, store, sums)
        path = result.write(checkpoint, found)
        if job.copy is not None:
            write_json(job.copy, found)
        result.show(found)
        logger.info("written to %s", path)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"evaluated {checkpoint.path}")
