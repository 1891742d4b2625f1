"""The engine beside a plain PyTorch loop and beside Hugging Face's Trainer, on the same architecture and numerics:
tokens a second, model FLOPs, where a step's time goes, memory, and what two data-parallel ranks make of it.

    python benchmarks/train_overhead.py [--rounds 15] [--json FILE]

All take turns in one process, a few steps each, so that whatever else the machine does meets each; the ratio of each
turn is kept and the median printed, by the clock and by processor seconds, which a busy machine disturbs less. Random
tokens, two micro-batches a step, one thread a rank; on a CPU one rank over gloo.

- FLOPs: 6 a matrix parameter and token, the output layer included, the input embedding not, and attention, half of it
  (causal) or whole (`model.size.flops_per_token`); beside what one thread makes of a large product in fp32 just before.
- memory: how far a process of its own grows in two steps beyond what it had after its imports.
- two ranks: the engine's ZeRO-1 and the plain loop's `DistributedDataParallel`, each over twice its own single rank;
  `strangers` are two ranks that know nothing of each other, which is what the machine gives.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

QUICKSTART = ModelConfig(layers=6, hidden_size=256, heads=8, kv_heads=4, ffn_hidden_size=704, tie_embeddings=True)
SMALL = ModelConfig(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=176, tie_embeddings=True)
SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 256, 4, 2
TOKENS = SEQUENCE * MICRO_BATCH * MICRO_BATCHES
STEPS_A_TURN = 2
WIDTH = 24
PHASES = ("forward_backward", "communication", "optimizer")
ENGINE, PLAIN, TRAINER = "engine", "plain PyTorch", "Trainer"


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


@dataclass(frozen=True)
class Turn:
    """Of a step, the mean or the median of a turn's."""

    seconds: float
    processor: float
    phases: Mapping[str, float]


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


def ours(case: Case, ranks: int = 1) -> Callable[[int], tuple[float, Mapping[str, float]]]:
    """A function that takes the engine's step-th step: its loss, and seconds by phase."""
    del ranks  # it finds them
    engine = engine_of(
        case.model,
        vocabulary_size=case.vocabulary_size,
        sequence=SEQUENCE,
        micro_batch=MICRO_BATCH,
        layout=ParallelConfig(zero_stage=1),
        dtype=case.dtype,
    )

    def step(number: int) -> tuple[float, Mapping[str, float]]:
        result = engine.step(random_batch(number, case.vocabulary_size))
        return float(result.loss), result.seconds

    return step


def plain(case: Case, ranks: int = 1) -> Callable[[int], tuple[float, Mapping[str, float]]]:
    """The same for the plain loop."""
    model = PlainLlama(case.model, case.vocabulary_size, SEQUENCE)
    loop = PlainLoop(model, learning_rate=1e-3, clip_norm=1.0, dtype=case.dtype, ranks=ranks)

    def step(number: int) -> tuple[float, Mapping[str, float]]:
        batch = random_batch(number, case.vocabulary_size)
        pieces = {name: tensor.split(MICRO_BATCH) for name, tensor in batch.items()}
        loss = loop.step([{name: pieces[name][index] for name in batch} for index in range(MICRO_BATCHES)])
        return loss, loop.phases

    return step


LOOPS = {ENGINE: ours, PLAIN: plain}


def turns(case: Case, name: str, ranks: int = 1) -> Callable[[int], Turn]:
    """A function that takes some steps of one of them, from the one of that number."""
    if name == TRAINER:
        loop = TrainerLoop(
            case.model,
            vocabulary_size=case.vocabulary_size,
            sequence=SEQUENCE,
            micro_batch=MICRO_BATCH,
            micro_batches=MICRO_BATCHES,
            dtype=case.dtype,
        )
        return lambda _first: Turn(*loop.turn(STEPS_A_TURN))
    step = LOOPS[name](case, ranks)

    def turn(first: int) -> Turn:
        started, used = time.perf_counter(), time.process_time()
        phases = [step(number)[1] for number in range(first, first + STEPS_A_TURN)]
        seconds, processor = time.perf_counter() - started, time.process_time() - used
        means = {phase: statistics.mean(each.get(phase, 0.0) for each in phases) for phase in PHASES}
        return Turn(seconds / STEPS_A_TURN, processor / STEPS_A_TURN, means)

    return turn


def check(case: Case) -> None:
    """The two compute the same thing, but for their initial weights."""
    first, second = ours(case), plain(case)
    losses = [(first(step)[0], second(step)[0]) for step in range(2)]
    assert all(abs(a - b) < 0.2 for a, b in losses), f"the two do not compute the same thing: {losses}"


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """By contestant, medians over the rounds; `over` and `processor_over`: the engine's speed over its own."""
    check(case)
    contestants = {name: turns(case, name) for name in (ENGINE, PLAIN, TRAINER)}
    for turn in contestants.values():
        turn(0)
    found: dict[str, list[Turn]] = defaultdict(list)
    for number in range(rounds):
        names = list(contestants) if number % 2 else list(contestants)[::-1]
        for name in names:
            found[name].append(contestants[name](10 + number * STEPS_A_TURN))
    peak = product_flops()
    return {name: figures(case, found[name], found[ENGINE], peak=peak) for name in contestants}


def figures(case: Case, own: Sequence[Turn], engine: Sequence[Turn], *, peak: float) -> dict[str, float]:
    rate = TOKENS / statistics.median(turn.seconds for turn in own)
    pairs = list(zip(own, engine, strict=True))
    row = {
        "tokens_per_second": rate,
        "over": statistics.median(turn.seconds / other.seconds for turn, other in pairs),
        "processor_over": statistics.median(turn.processor / other.processor for turn, other in pairs),
        "product_flops": peak,
    }
    for count in ("causal", "full"):
        a_token = flops_per_token(case.model, case.vocabulary_size, SEQUENCE, causal=count == "causal")
        row |= {f"flops_{count}": rate * a_token, f"mfu_{count}": rate * a_token / peak}
    for phase in PHASES:
        row[f"{phase}_seconds"] = statistics.median(turn.phases.get(phase, 0.0) for turn in own)
    return row


def product_flops(side: int = 1024) -> float:
    """FLOP/s of a product of two fp32 matrices, the best of a few."""
    left, right = torch.randn(side, side), torch.randn(side, side)
    seconds = []
    for _ in range(8):
        started = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def rank_work(case: Case, name: str, ranks: int) -> tuple[float, float]:
    """A rank's: the median seconds of a step on its own micro-batches, of the clock and of the processor, after a turn
    that does not count."""
    turn = turns(case, name, ranks)
    found = [turn(10 * number) for number in range(6)][1:]
    return statistics.median(each.seconds for each in found), statistics.median(each.processor for each in found)


def among_strangers(case: Case, name: str) -> tuple[float, float]:
    """The same of a rank that knows nothing of the others, which work at the same time."""
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return rank_work(case, name, 1)


def memory_of(case: Case, name: str) -> int:
    """Bytes by which this process grows at most in two steps."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark begins anew
    before = _status("VmRSS")
    turns(case, name)(0)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def in_worlds(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """What wants processes of its own: scaling over ranks, and memory."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name in LOOPS:
        for _ in range(rounds):
            one = run_world(rank_work, 1, case, name, 1, seconds=600)[0]
            two = run_world(rank_work, 2, case, name, 2, seconds=600)
            strangers = run_world(among_strangers, 2, case, name, seconds=600)
            found[name]["scaling"].append(one[0] / max(rank[0] for rank in two))
            found[name]["scaling_processor"].append(one[1] / max(rank[1] for rank in two))
            found[name]["scaling_machine"].append(one[0] / max(rank[0] for rank in strangers))
    for name in (ENGINE, PLAIN, TRAINER):
        found[name]["memory_bytes"] = [float(run_world(memory_of, 1, case, name, seconds=600)[0])]
    return {name: {key: statistics.median(each) for key, each in row.items()} for name, row in found.items()}


def cells(row: Mapping[str, float], *, is_engine: bool) -> dict[str, str]:
    """What is printed of a contestant."""

    def ratio(name: str) -> str:
        return f"{row[name]:.3f}" if name in row else "-"

    return {
        "tokens/s": format_count(row["tokens_per_second"]),
        "engine over it, clock": "" if is_engine else ratio("over"),
        "engine over it, processor": "" if is_engine else ratio("processor_over"),
        "model GFLOP/s, causal": f"{row['flops_causal'] / 1e9:.1f} ({row['mfu_causal']:.1%} of product)",
        "model GFLOP/s, full": f"{row['flops_full'] / 1e9:.1f} ({row['mfu_full']:.1%} of product)",
        **{f"{phase.replace('_', ' ')} ms": f"{1000 * row[f'{phase}_seconds']:.1f}" for phase in PHASES},
        "memory of two steps": format_bytes(int(row["memory_bytes"])),
        "two ranks / twice one": ratio("scaling"),
        "  by the processor": ratio("scaling_processor"),
        "  two strangers": ratio("scaling_machine"),
    }


def print_case(case: Case, table: Mapping[str, Mapping[str, float]]) -> None:
    """One column a contestant."""
    columns = {name: cells(row, is_engine=name == ENGINE) for name, row in table.items()}
    title = f"{case.name}, {format_count(parameter_count(case.model, case.vocabulary_size))} parameters"
    print(f"\n{title:<28}" + "".join(f"{name:<{WIDTH}}" for name in columns))
    for head in columns[ENGINE]:
        print(f"{head:<28}" + "".join(f"{column[head]:<{WIDTH}}" for column in columns.values()).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="turns per precision (15)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    worlds = {case.name: in_worlds(case, max(1, arguments.rounds // 5)) for case in CASES}  # forks: before any group
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print(f"sequence {SEQUENCE}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians", flush=True)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for case in CASES:
        found = measure(case, arguments.rounds)
        table[case.name] = {name: {**row, **worlds[case.name][name]} for name, row in found.items()}
        print_case(case, table[case.name])
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=2) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
