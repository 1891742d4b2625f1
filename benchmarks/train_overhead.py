"""Tokens a second of the engine over a plain PyTorch loop, and over Hugging Face's Trainer, on the same architecture
and numerics, in one process; then two data-parallel ranks over twice one.

    python benchmarks/train_overhead.py [--rounds 15] [--json FILE]

All take turns, a few steps each, so that whatever else the machine does meets each; the ratio of each turn is kept and
the median printed, beside the ratio of processor seconds, which a busy machine disturbs less. One rank over gloo, two
micro-batches a step, random tokens; the ranks have one thread each.

Of the engine are printed besides: where a step's time goes; its model FLOPs in both counts, of a causal model's half of
the attention matrix and of all of it, each over what one thread makes of a large product in fp32 just before; and the
highest memory of a rank's process, of which the imports are the larger part here.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from engines import engine_of
from plain import PlainLlama, PlainLoop
from trainer import TrainerLoop

from launcher.verify.world import run_world
from model.config import ModelConfig
from model.size import flops_per_token, parameter_count
from parallel.common.units import format_bytes, format_count
from parallel.config import ParallelConfig
from parallel.engine import StepResult

QUICKSTART = ModelConfig(layers=6, hidden_size=256, heads=8, kv_heads=4, ffn_hidden_size=704, tie_embeddings=True)
SMALL = ModelConfig(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=176, tie_embeddings=True)
SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 256, 4, 2
STEPS_A_TURN = 2
WIDTH = 70
PHASES = ("forward_backward", "communication", "optimizer")


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


def our_step(case: Case) -> Callable[[int], StepResult]:
    """A function that takes the engine's step-th step."""
    engine = engine_of(
        case.model,
        vocabulary_size=case.vocabulary_size,
        sequence=SEQUENCE,
        micro_batch=MICRO_BATCH,
        layout=ParallelConfig(zero_stage=1),
        dtype=case.dtype,
    )
    return lambda step: engine.step(random_batch(step, case.vocabulary_size))


def plain_step(case: Case) -> Callable[[int], float]:
    """The same for the plain loop."""
    model = PlainLlama(case.model, case.vocabulary_size, SEQUENCE)
    loop = PlainLoop(model, learning_rate=1e-3, clip_norm=1.0, dtype=case.dtype)

    def step(number: int) -> float:
        batch = random_batch(number, case.vocabulary_size)
        pieces = {name: tensor.split(MICRO_BATCH) for name, tensor in batch.items()}
        return loop.step([{name: pieces[name][index] for name in batch} for index in range(MICRO_BATCHES)])

    return step


def turn(step: Callable[[int], object], first: int) -> tuple[float, float]:
    """Seconds for a turn of steps, of the clock and of the processor."""
    started, used = time.perf_counter(), time.process_time()
    for number in range(first, first + STEPS_A_TURN):
        step(number)
    return time.perf_counter() - started, time.process_time() - used


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Medians of tokens a second and of the ratio."""
    ours, plain, trainer = our_step(case), plain_step(case), trainer_loop(case)
    losses = [(float(ours(step).loss), plain(step)) for step in range(2)]
    assert all(abs(a - b) < 0.2 for a, b in losses), f"the two do not compute the same thing: {losses}"
    pairs, processor, split = [], [], []
    for number in range(rounds):
        first = 10 + number * STEPS_A_TURN
        order = (ours, plain) if number % 2 else (plain, ours)
        seconds = {step: turn(step, first) for step in order}
        pairs.append((seconds[ours][0], seconds[plain][0], STEPS_A_TURN * trainer.turn(STEPS_A_TURN)))
        processor.append(seconds[plain][1] / seconds[ours][1])
        split.append(ours(first).seconds)
    tokens = STEPS_A_TURN * MICRO_BATCH * MICRO_BATCHES * SEQUENCE
    rate = tokens / statistics.median(pair[0] for pair in pairs)
    flops = {
        name: rate * flops_per_token(case.model, case.vocabulary_size, SEQUENCE, causal=causal)
        for name, causal in (("causal", True), ("full", False))
    }
    peak = product_flops()
    return {
        **{f"flops_{name}": found for name, found in flops.items()},
        **{f"mfu_{name}": found / peak for name, found in flops.items()},
        "product_flops": peak,
        **{f"{phase}_seconds": statistics.median(each[phase] for each in split) for phase in PHASES},
        "tokens_per_second": rate,
        "plain_tokens_per_second": tokens / statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[1] / pair[0] for pair in pairs),
        "processor_ratio": statistics.median(processor),
        "trainer_tokens_per_second": tokens / statistics.median(pair[2] for pair in pairs),
        "trainer_ratio": statistics.median(pair[2] / pair[0] for pair in pairs),
    }


def product_flops(side: int = 1024) -> float:
    """FLOP/s of a product of two fp32 matrices, the best of a few."""
    left, right = torch.randn(side, side), torch.randn(side, side)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


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


def rank_work(case: Case) -> tuple[float, float, int]:
    """A rank's: the median seconds of a step on its own micro-batches, of the clock and of the processor, after two
    steps that do not count; and the highest memory of its process, in bytes."""
    step = our_step(case)
    turns = [turn(step, 10 * number) for number in range(6)][1:]
    clock, processor = (statistics.median(each) / STEPS_A_TURN for each in zip(*turns, strict=True))
    return clock, processor, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def among_strangers(case: Case) -> tuple[float, float, int]:
    """The same of a rank that knows nothing of the others, which work at the same time."""
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return rank_work(case)


def scaling(case: Case, rounds: int) -> dict[str, float]:
    """Tokens a second of two data-parallel ranks over twice those of one, and what bounds it."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        one = run_world(rank_work, 1, case, seconds=600)[0]
        two = run_world(rank_work, 2, case, seconds=600)
        found["scaling"].append(one[0] / max(rank[0] for rank in two))
        found["scaling_processor"].append(one[1] / max(rank[1] for rank in two))
        strangers = run_world(among_strangers, 2, case, seconds=600)
        found["scaling_machine"].append(one[0] / max(rank[0] for rank in strangers))
        found["memory_bytes"].append(one[2])
    return {name: statistics.median(values) for name, values in found.items()}


def cells(row: Mapping[str, float]) -> dict[str, str]:
    """What is printed of a case."""
    speed = partial(_rate, row)
    split = [f"{phase.replace('_', ' ')} {row[f'{phase}_seconds'] * 1000:.1f} ms" for phase in PHASES]
    return {
        "engine": speed("tokens_per_second"),
        "plain loop": speed("plain_tokens_per_second"),
        "engine / plain loop": f"{row['ratio']:.3f} by the clock, {row['processor_ratio']:.3f} by the processor",
        "Hugging Face Trainer": speed("trainer_tokens_per_second"),
        "engine / Trainer": f"{row['trainer_ratio']:.3f}",
        "two ranks / twice one": f"{row['scaling']:.3f} by the clock, {row['scaling_processor']:.3f} by the processor",
        "two strangers / twice one": f"{row['scaling_machine']:.3f}",
        "a step": ", ".join(split),
        "model FLOPs, causal": f"{row['flops_causal'] / 1e9:.1f} GFLOP/s, {row['mfu_causal']:.1%} of a product's",
        "model FLOPs, full": f"{row['flops_full'] / 1e9:.1f} GFLOP/s, {row['mfu_full']:.1%} of a product's",
        "a rank's process": format_bytes(int(row["memory_bytes"])),
    }


def _rate(row: Mapping[str, float], name: str) -> str:
    return f"{format_count(row[name])} tok/s"


def print_rows(table: Mapping[str, Mapping[str, str]]) -> None:
    """One column a case."""
    print(f"{'':<28}" + "".join(f"{name:<{WIDTH}}" for name in table))
    for head in next(iter(table.values())):
        print(f"{head:<28}" + "".join(f"{row[head]:<{WIDTH}}" for row in table.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns per precision (15)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    scaled = {case.name: scaling(case, max(1, arguments.rounds // 5)) for case in CASES}  # forks: before any group
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"sequence {SEQUENCE}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians")
    table = {case.name: {**measure(case, arguments.rounds), **scaled[case.name]} for case in CASES}
    parameters = {case.name: format_count(parameter_count(case.model, case.vocabulary_size)) for case in CASES}
    print_rows({name: {"parameters": parameters[name], **cells(row)} for name, row in table.items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
