"""A checkpoint on the validation documents by its own objective, where bits of text mean nothing: covered tokens, pairs
of segments, spans.

Beside the loss of each part stands what needs no model: the entropy of the labels themselves, which no guess that is
the same everywhere gets below (marks count, so a T5 has to know its own), and for pairs the ln 2 of a coin. What is
covered is the same each time.
"""

import logging
import math
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
from launcher.meter import means
from launcher.objective import objective_of
from launcher.outcome import Outcome
from launcher.runtime import in_ranks
from launcher.verbs.evaluate import EvaluateJob
from launcher.work import Ranks
from parallel.checkpoint.load import load
from parallel.common.files import write_json
from parallel.engine import Batch, Engine
from parallel.topology import Topology

COIN = math.log(2)
"""Nats of a pair of segments for who does not look."""

logger = logging.getLogger(__name__)


def entropy(counts: Tensor) -> float:
    """Nats of something that is drawn by these counts."""
    shares = counts[counts > 0] / counts.sum()
    return -float((shares * shares.log()).sum())


def evaluate(engine: Engine, batches: Iterable[Batch], rows: int) -> dict[str, Any]:
    """`losses` of the whole and of each part that the objective reports, `baselines`, and how many labels counted; all
    ranks call this together. `rows` is the size of the vocabulary."""
    total = torch.zeros(2, dtype=torch.float64)  # loss, weight
    counts = torch.zeros(rows, dtype=torch.float64)
    reported: dict[str, Tensor] = {}
    for batch in batches:
        found = engine.evaluate(batch)
        counts += torch.bincount(batch["labels"].flatten(), batch["loss_weights"].double().flatten(), rows)
        weight = found.weight.item()
        total += torch.tensor([found.loss.item() * weight, weight], dtype=torch.float64)
        for name, pair in found.reported.items():
            reported[name] = reported[name] + pair if name in reported else pair
    loss, weight = total.tolist()
    counts = counts.to(engine.topology.device)
    dist.all_reduce(counts, group=engine.topology.groups.dp)
    unigram = entropy(counts)
    baselines = {"loss": unigram, **{name: unigram for name in reported if name == "masked_loss"}}
    if "next_sentence_loss" in reported:
        baselines |= {"next_sentence_loss": COIN, "next_sentence_accuracy": 0.5, "loss": baselines["loss"] + COIN}
    return {"losses": {"loss": loss / weight, **means(reported)}, "baselines": baselines, "tokens": int(weight)}


def work(job: EvaluateJob) -> int:
    """Joins the ranks, evaluates, writes; returns the exit code."""
    return in_ranks(lambda ranks: _evaluated(job, ranks), job.ranks)


def _evaluated(job: EvaluateJob, ranks: Ranks) -> Outcome:
    config, checkpoint = job.config, job.checkpoint
    store = Store.open(Path(config.data.store))
    topology = Topology.create(config.parallel)
    rows = vocabulary_size(config, store)
    engine = make_engine(config, vocabulary_size=rows, topology=topology, objective=objective_of(config))
    load(checkpoint.path, {"model": engine.participants()["model"]})
    batches = validation_batches(config, store=store, topology=topology)
    found = {**result.identity(checkpoint, store), **evaluate(engine, batches, rows)}
    if ranks.rank == 0:
        path = result.write(checkpoint, found)
        if job.copy is not None:
            write_json(job.copy, found)
        result.show(found)
        logger.info("written to %s", path)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"evaluated {checkpoint.path}")
