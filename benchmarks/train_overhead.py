"""Tokens a second of the engine over a plain PyTorch loop, and over Hugging Face's Trainer, on the same architecture
and numerics, in one process; then two data-parallel ranks over twice one.

    python benchmarks/train_overhead.py [--rounds 15] [--json FILE]

All take turns, a few steps each, so that whatever else the machine does meets each; the ratio of each turn is kept and
the median printed, beside the ratio of processor seconds, which a busy machine disturbs less. One rank over gloo, two
micro-batches a step, random tokens; the ranks have one thread each.
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
import transformers
from plain import PlainLlama, PlainLoop
from trainer import TrainerLoop

from launcher.verify.world import run_world
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
WIDTH = 16


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


def turn(step: Callable[[int], float], first: int) -> tuple[float, float]:
    """Seconds for a turn of steps, of the clock and of the processor."""
    started, used = time.perf_counter(), time.process_time()
    for number in range(first, first + STEPS_A_TURN):
        step(number)
    return time.perf_counter() - started, time.process_time() - used


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Medians of tokens a second and of the ratio."""
    ours, plain, trainer = our_step(case), plain_step(case), trainer_loop(case)
    losses = [(ours(step), plain(step)) for step in range(2)]
    assert all(abs(a - b) < 0.2 for a, b in losses), f"the two do not compute the same thing: {losses}"
    pairs, processor = [], []
    for number in range(rounds):
        first = 10 + number * STEPS_A_TURN
        order = (ours, plain) if number % 2 else (plain, ours)
        seconds = {step: turn(step, first) for step in order}
        pairs.append((seconds[ours][0], seconds[plain][0], STEPS_A_TURN * trainer.turn(STEPS_A_TURN)))
        processor.append(seconds[plain][1] / seconds[ours][1])
    tokens = STEPS_A_TURN * MICRO_BATCH * MICRO_BATCHES * SEQUENCE
    return {
        "tokens_per_second": tokens / statistics.median(pair[0] for pair in pairs),
        "plain_tokens_per_second": tokens / statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
        "processor_ratio": statistics.median(processor),
        "trainer_tokens_per_second": tokens / statistics.median(pair[2] for pair in pairs),
        "trainer_ratio": statistics.median(pair[2] / pair[0] for pair in pairs),
    }


def trainer_loop(case: Case) -> TrainerLoop:
    """The same for Hugging Face's."""
    return TrainerLoop(
        case.model,
        vocabulary_size=case.vocabulary_size,
        sequence=SEQUENCE,
        micro_batch=MICRO_BATCH,
        micro_batches=MICRO_BATCHES,
        dtype=case.dtype,
    )


def rank_seconds(case: Case) -> float:
    """A rank's work: the median seconds of a step on its own micro-batches, after two that do not count."""
    step = our_step(case)
    return statistics.median([turn(step, 10 * number)[0] for number in range(6)][1:]) / STEPS_A_TURN


def scaling(case: Case, rounds: int) -> float:
    """Tokens a second of two data-parallel ranks over twice those of one."""
    ratios = []
    for _ in range(rounds):
        alone, together = (max(run_world(rank_seconds, ranks, case, seconds=600)) for ranks in (1, 2))
        ratios.append(alone / together)
    return statistics.median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns per precision (15)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    scaled = {case.name: scaling(case, max(1, arguments.rounds // 5)) for case in CASES}  # forks: before any group
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"sequence {SEQUENCE}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians")
    heads = ("parameters", "engine", "plain loop", "ratio", "processor", "Trainer", "ratio", "2 ranks / 2x1")
    print(f"{'precision':<10}" + "".join(f"{head:>{WIDTH}}" for head in heads))
    table = {}
    for case in CASES:
        table[case.name] = row = {**measure(case, arguments.rounds), "scaling": scaled[case.name]}
        speed = {key: f"{format_count(row[key])} tok/s" for key in row if key.endswith("tokens_per_second")}
        cells = (
            format_count(parameter_count(case.model, case.vocabulary_size)),
            speed["tokens_per_second"],
            speed["plain_tokens_per_second"],
            f"{row['ratio']:.3f}",
            f"{row['processor_ratio']:.3f}",
            speed["trainer_tokens_per_second"],
            f"{row['trainer_ratio']:.3f}",
            f"{row['scaling']:.3f}",
        )
        print(f"{case.name:<10}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
