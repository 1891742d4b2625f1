"""Tokens a second of the engine over a plain PyTorch loop on the same architecture and numerics, in one process.

    python benchmarks/train_overhead.py [--rounds 15] [--json FILE]

The two take turns, a few steps each, so that whatever else the machine does meets both; the ratio of each pair of
turns is kept and the median printed. One rank over gloo, ZeRO-1, two micro-batches a step,
random tokens.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from plain import PlainLlama, PlainLoop

from model.build import build
from model.config import ModelConfig
from model.objectives import Prediction
from model.size import parameter_count
from parallel.common.units import format_count
from parallel.config import OptimizerConfig, ParallelConfig, ScheduleConfig, ScheduleName
from parallel.engine import Engine
from parallel.schedules import Schedule
from parallel.topology import Topology

QUICKSTART = ModelConfig(layers=6, hidden_size=256, heads=8, kv_heads=4, ffn_hidden_size=704, tie_embeddings=True)
SMALL = ModelConfig(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=176, tie_embeddings=True)
SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 256, 4, 2
STEPS_A_TURN = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained; the bf16 model is small, for a CPU without bf16 instructions is a hundred times slower."""

    name: str
    model: ModelConfig
    vocabulary_size: int
    dtype: torch.dtype


CASES = (
    Case(name="fp32", model=QUICKSTART, vocabulary_size=8192, dtype=torch.float32),
    Case(name="bf16", model=SMALL, vocabulary_size=512, dtype=torch.bfloat16),
)


def random_batch(step: int, vocabulary_size: int) -> dict[str, torch.Tensor]:
    """A step's samples: random tokens, one document a row."""
    rows = MICRO_BATCH * MICRO_BATCHES
    tokens = torch.randint(0, vocabulary_size, (rows, SEQUENCE + 1), generator=torch.Generator().manual_seed(step))
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_weights": torch.ones(rows, SEQUENCE),
        "positions": torch.arange(SEQUENCE).repeat(rows, 1),
        "document_ids": torch.zeros(rows, SEQUENCE, dtype=torch.int32),
        "sample_ids": torch.arange(rows),
    }


def our_step(case: Case) -> Callable[[int], float]:
    """A function that takes the engine's step-th step and returns its loss."""
    topology = Topology.create(ParallelConfig(zero_stage=1))
    optimizer = OptimizerConfig(learning_rate=1e-3, schedule=ScheduleConfig(name=ScheduleName.constant))
    chunks = build(
        case.model,
        vocabulary_size=case.vocabulary_size,
        sequence_length=SEQUENCE,
        dtype=case.dtype,
        topology=topology,
        seed=1,
    )
    engine = Engine(
        chunks,
        objective=Prediction(),
        topology=topology,
        optimizer=optimizer,
        schedule=Schedule(optimizer, total_steps=1),
        micro_batch_size=MICRO_BATCH,
        sequence_length=SEQUENCE,
    )
    return lambda step: float(engine.step(random_batch(step, case.vocabulary_size)).loss)


def plain_step(case: Case) -> Callable[[int], float]:
    """The same for the plain loop."""
    model = PlainLlama(case.model, case.vocabulary_size, SEQUENCE)
    loop = PlainLoop(model, learning_rate=1e-3, clip_norm=1.0, dtype=case.dtype)

    def step(number: int) -> float:
        batch = random_batch(number, case.vocabulary_size)
        pieces = {name: tensor.split(MICRO_BATCH) for name, tensor in batch.items()}
        return loop.step([{name: pieces[name][index] for name in batch} for index in range(MICRO_BATCHES)])

    return step


def turn(step: Callable[[int], float], first: int) -> float:
    """Seconds for a turn of steps."""
    started = time.perf_counter()
    for number in range(first, first + STEPS_A_TURN):
        step(number)
    return time.perf_counter() - started


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Medians of tokens a second and of the ratio."""
    ours, plain = our_step(case), plain_step(case)
    losses = [(ours(step), plain(step)) for step in range(2)]
    assert all(abs(a - b) < 0.2 for a, b in losses), f"the two do not compute the same thing: {losses}"
    pairs = []
    for number in range(rounds):
        first = 10 + number * STEPS_A_TURN
        order = (ours, plain) if number % 2 else (plain, ours)
        seconds = {step: turn(step, first) for step in order}
        pairs.append((seconds[ours], seconds[plain]))
    tokens = STEPS_A_TURN * MICRO_BATCH * MICRO_BATCHES * SEQUENCE
    return {
        "tokens_per_second": tokens / statistics.median(pair[0] for pair in pairs),
        "plain_tokens_per_second": tokens / statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of turns per precision (15)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"sequence {SEQUENCE}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians")
    print(f"{'precision':<10}{'parameters':>11}{'engine':>14}{'plain loop':>14}{'ratio':>9}")
    table = {}
    for case in CASES:
        table[case.name] = row = measure(case, arguments.rounds)
        size = format_count(parameter_count(case.model, case.vocabulary_size))
        speeds = (f"{format_count(row[key])} tok/s" for key in ("tokens_per_second", "plain_tokens_per_second"))
        print(f"{case.name:<10}{size:>11}{next(speeds):>14}{next(speeds):>14}{row['ratio']:>9.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
