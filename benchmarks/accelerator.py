"""One accelerator in one call: the numerics against a CPU, the groups, then how fast known shapes train.

    python benchmarks/accelerator.py [--cases llama-1b ...] [--variants ...] [--steps 10] [--json FILE]
    python benchmarks/accelerator.py --cases tiny               # on a CPU: that everything here works

Each measurement is a process of its own, so that one that runs out of memory, or fails, loses no other; its row is
printed and written to the file as soon as it is there.

- `numerics`: a tiny model on the device in fp32 and bf16 beside the same in float64 on the CPU: loss and gradients.
- `alone`: a world of one over NCCL (gloo on a CPU) with every group built.
- `together`: two processes that share the device, over gloo, in several layouts: their losses beside one rank's.
- a case: tokens a second, MFU in both counts (6 FLOPs a matrix parameter and token, the output layer included, the
  input embedding not, and attention, halved or whole; `model.size.flops_per_token`), peak memory, and where the
  device's time goes; bf16 with fp32 masters and fp32 accumulation, random tokens, medians of whole steps after three
  that do not count. A micro-batch that does not fit is halved, recomputing everything is the last resort. Each case is
  measured twice, to see the noise, beside the same shape in plain PyTorch under `torch.compile`.
- a variant (`variants.py`) is built otherwise, or changes the model that was built; what wins belongs into `model`.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from engines import engine_of
from plain import PlainLlama, PlainLoop
from torch.profiler import ProfilerActivity, profile
from variants import VARIANTS

from launcher import config as configuration
from launcher.plan.hardware import of_device
from launcher.verify.world import run_world
from model.config import ModelConfig
from model.size import flops_per_token, parameter_count
from parallel.common.units import format_bytes, format_count
from parallel.config import ParallelConfig, Recompute, RecomputeConfig
from parallel.engine import Engine

ROOT = Path(__file__).parents[1]
WARM_UP = 3
DOCUMENT_TOKENS = 512
"""Mean length of a packed document."""
LIMIT_SECONDS = 240


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape: a named model of configs/model and what differs from it."""

    model: str
    changes: Sequence[str] = ()
    vocabulary_size: int = 128_256
    sequence: int = 4096
    micro_batch: int = 4
    micro_batches: int = 2
    packed: bool = False

    @property
    def config(self) -> ModelConfig:
        """The model."""
        return configuration.load([str(ROOT / "configs" / "model" / f"{self.model}.yaml")], self.changes).model


_TINY = ["model.layers=2", "model.hidden_size=128", "model.heads=4", "model.kv_heads=2", "model.ffn_hidden_size=256"]
CASES = {
    "tiny": Case(model="llama-10m", changes=_TINY, vocabulary_size=512, sequence=64, micro_batch=2),
    "llama-1b": Case(model="llama-1b"),
    "llama-1b-packed": Case(model="llama-1b", packed=True),
    "llama-3b": Case(model="llama-3b"),
    "llama-8b-slice": Case(model="llama-8b", changes=["model.layers=7"]),
    "moe-1b-active": Case(
        model="llama-1b", changes=["model.moe.experts=8", "model.moe.top_k=2", "model.moe.ffn_hidden_size=2816"]
    ),
}
"""`llama-8b-slice` has the width of 8 B; `moe-1b-active` has eight experts, of which a token passes two."""
LAYOUTS = {
    "one rank": ParallelConfig(),
    "data 2, ZeRO 1": ParallelConfig(zero_stage=1),
    "data 2, ZeRO 3": ParallelConfig(zero_stage=3),
    "tensor 2": ParallelConfig(tensor=2, zero_stage=1),
    "pipeline 2": ParallelConfig(pipeline=2, zero_stage=1),
}
KINDS = {
    "matrices": r"gemm|cutlass|nvjet|xmma|aten::(mm|bmm|addmm)$",
    "attention": r"flash|fmha|attention|cudnn",
    "optimizer": r"adam|multi_tensor|foreach",
    "communication": r"nccl|gloo|c10d",
    "copies": r"memcpy|memset|copy_kernel|aten::copy_",
}
"""The rest is `between`: norms, activations, cross-entropy."""


def batch_of(case: Case, step: int) -> dict[str, torch.Tensor]:
    """A step's samples: random tokens, one document a row, or documents of many lengths."""
    rows, random = case.micro_batch * case.micro_batches, torch.Generator().manual_seed(step)
    tokens = torch.randint(0, case.vocabulary_size, (rows, case.sequence + 1), generator=random)
    borders = torch.zeros(rows, case.sequence, dtype=torch.bool)
    if case.packed:
        borders = torch.rand(rows, case.sequence, generator=random) < 1 / DOCUMENT_TOKENS
        borders[:, 0] = False
    ids = borders.cumsum(dim=1)
    places = torch.arange(case.sequence).expand(rows, -1)
    begins = torch.where(borders, places, 0).cummax(dim=1).values
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_weights": torch.ones(rows, case.sequence),
        "positions": places - begins,
        "document_ids": ids.to(torch.int32),
        "sample_ids": torch.arange(rows),
    }


def engine(case: Case, layout: ParallelConfig, dtype: torch.dtype, **options: Any) -> Engine:
    """The engine of a case; `options` are those of `engine_of`."""
    return engine_of(
        case.config,
        vocabulary_size=case.vocabulary_size,
        sequence=case.sequence,
        micro_batch=case.micro_batch,
        layout=layout,
        dtype=dtype,
        learning_rate=1e-4,
        **options,
    )


def case_of(name: str, variant: str, micro_batch: int, recompute: str, steps: int) -> dict[str, Any]:
    """Trains a case for some steps and measures them."""
    case = replace(CASES[name], micro_batch=micro_batch)
    chosen = VARIANTS[variant]
    layout = ParallelConfig(zero_stage=1, recompute=RecomputeConfig(mode=Recompute(recompute)), **chosen.layout)
    built = engine(case, layout, torch.bfloat16, in_eight_bits=chosen.in_eight_bits)
    chosen.change(built)
    batches = [batch_of(case, step) for step in range(WARM_UP + steps)]
    seconds = _timed(lambda step: float(built.step(batches[step]).loss), steps)
    return {**_rates(case, seconds), "recompute": recompute, "time": _shares(lambda: built.step(batches[0]))}


def plain_of(name: str, micro_batch: int, steps: int) -> dict[str, Any]:
    """The same in plain PyTorch under torch.compile; a document a row, whatever the case says."""
    case = replace(CASES[name], micro_batch=micro_batch, packed=False)
    plain = PlainLlama(case.config, case.vocabulary_size, case.sequence).to(_device())
    if torch.cuda.is_available():  # on a CPU it asks for a compiler
        plain.forward = torch.compile(plain.forward)
    loop = PlainLoop(plain, learning_rate=1e-4, clip_norm=1.0, dtype=torch.bfloat16)

    def step(number: int) -> float:
        pieces = {key: tensor.split(micro_batch) for key, tensor in batch_of(case, number).items()}
        return loop.step([{key: pieces[key][index] for key in pieces} for index in range(case.micro_batches)])

    seconds = _timed(step, steps)
    return {**_rates(case, seconds), "time": _shares(lambda: step(0))}


def numerics() -> dict[str, Any]:
    """The largest relative error of a gradient, and the loss's, of fp32 and bf16 on the device against float64 here."""
    case = CASES["tiny"]

    def found(dtype: torch.dtype, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
        built = engine(case, ParallelConfig(), dtype, device=device)
        loss = float(built.accumulate(batch_of(case, 0)).loss)
        return loss, {local.name: built.updater.gradient(local).double().cpu() for local in built.parameters}

    loss, gradients = found(torch.float64, torch.device("cpu"))
    result: dict[str, Any] = {"loss": loss}
    for dtype in (torch.float32, torch.bfloat16):
        ours, own = found(dtype, _device())
        errors = {name: float((own[name] - gradients[name]).norm() / gradients[name].norm()) for name in gradients}
        worst = max(errors, key=lambda name: errors[name])
        result[str(dtype)] = {"loss": abs(ours - loss) / loss, "gradient": errors[worst], "worst": worst}
    return result


def alone() -> dict[str, Any]:
    """Three steps in a world of one over the device's own backend."""
    built = engine(CASES["tiny"], ParallelConfig(zero_stage=1), torch.float32)
    losses = [float(built.step(batch_of(CASES["tiny"], step)).loss) for step in range(3)]
    return {"backend": dist.get_backend(), "losses": losses}


def together() -> dict[str, Any]:
    """Three steps of two processes that share the device, in several layouts, over gloo; and of one alone."""
    result = {}
    for name, layout in LAYOUTS.items():
        ranks = 1 if layout == ParallelConfig() else 2
        try:
            result[name] = run_world(_sharing, ranks, layout, seconds=LIMIT_SECONDS / 2)[-1]
        except Exception as error:  # what gloo does not have for the device is what this looks for
            result[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return result


def _sharing(layout: ParallelConfig) -> list[float]:
    case = CASES["tiny"]
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    built = engine(case, layout, torch.float32, device=device)
    rows = case.micro_batch * case.micro_batches // built.topology.data_parallel_size
    first = built.topology.data_parallel_rank * rows
    losses = []
    for step in range(3):
        batch = {name: tensor[first : first + rows] for name, tensor in batch_of(case, step).items()}
        losses.append(float(built.step(batch).loss))
    return losses


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _timed(step: Callable[[int], float], steps: int) -> list[float]:
    """Seconds of each step after those that do not count; a step ends when its loss can be read."""
    seconds = []
    for number in range(WARM_UP + steps):
        started = time.perf_counter()
        loss = step(number)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        assert loss == loss, f"the loss of step {number} is not a number"
    return seconds[WARM_UP:]


def _rates(case: Case, seconds: Sequence[float]) -> dict[str, Any]:
    rate = case.micro_batch * case.micro_batches * case.sequence / statistics.median(seconds)
    row: dict[str, Any] = {
        "parameters": parameter_count(case.config, case.vocabulary_size),
        "micro_batch": case.micro_batch,
        "tokens_per_second": rate,
        "memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
    machine = of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    for name, causal in (("mfu_causal", True), ("mfu_full", False)):
        flops = rate * flops_per_token(case.config, case.vocabulary_size, case.sequence, causal=causal)
        row[name.replace("mfu", "flops")] = flops
        row[name] = flops / machine.peak_flops["bf16"] if machine else None
    return row


def _shares(step: Callable[[], object]) -> dict[str, float]:
    """Which share of the device's time in a step goes where."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as watched:
        step()
        if cuda:
            torch.cuda.synchronize()
    sums = dict.fromkeys((*KINDS, "between"), 0.0)
    for event in watched.key_averages():
        if cuda and event.device_type is torch.autograd.DeviceType.CPU:
            continue  # what launched a kernel has the kernel's time too
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, event.key, re.IGNORECASE))
        sums[next(kinds, "between")] += spent
    total = sum(sums.values()) or 1.0
    return {kind: spent / total for kind, spent in sums.items()}


def measured(*words: str) -> dict[str, Any]:
    """One measurement in a process of its own; `failed` says why there is none."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--one", *words, "--json", file.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {LIMIT_SECONDS} s"}
        if done.returncode == 0:
            return json.loads(Path(file.name).read_text())
    lines = done.stderr.strip().splitlines() or ["no word"]
    memory = any("out of memory" in line.lower() for line in lines)
    return {"failed": "out of memory" if memory else lines[-1]}


def fitting(name: str, variant: str, steps: int) -> dict[str, Any]:
    """A case with the largest micro-batch that fits."""
    micro_batch = CASES[name].micro_batch
    tries = [(size, "none") for size in (micro_batch, micro_batch // 2, micro_batch // 4) if size] + [(1, "full")]
    row: dict[str, Any] = {}
    for size, recompute in tries:
        row = measured("case", name, variant, str(size), recompute, str(steps))
        if row.get("failed") != "out of memory":
            break
    return row


def one(words: Sequence[str]) -> dict[str, Any]:
    """What a process of its own measures."""
    kind, *rest = words
    if kind == "together":
        return together()  # forks: no group and no device before
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if kind == "case":
        name, variant, micro_batch, recompute, steps = rest
        return case_of(name, variant, int(micro_batch), recompute, int(steps))
    if kind == "plain":
        name, micro_batch, steps = rest
        return plain_of(name, int(micro_batch), int(steps))
    return {"numerics": numerics, "alone": alone}[kind]()


def shown(name: str, row: dict[str, Any]) -> str:
    """A line of the table."""
    if "failed" in row:
        return f"{name:<40}{row['failed']}"
    mfu = "/".join("-" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu_causal", "mfu_full"))
    memory = "-" if row["memory_bytes"] is None else format_bytes(row["memory_bytes"])
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in row["time"].items() if share > 0.005)
    return (
        f"{name:<40}{format_count(row['parameters']):>8}{row['micro_batch']:>4}{row.get('recompute', '-'):>6}"
        f"{format_count(row['tokens_per_second']):>9} tok/s{row['flops_causal'] / 1e12:>8.1f} TFLOP/s{mfu:>14}"
        f"{memory:>10}  {shares}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, help="all but the tiny one, which is for a CPU")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=10, help="that are measured (10)")
    parser.add_argument("--json", type=Path, help="also write everything to this file, as it comes")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        options.json.write_text(json.dumps(one(options.one)))
        return 0
    if not options.cases and not torch.cuda.is_available():
        print("there is no accelerator; --cases tiny shows that everything works")
        return 0
    cases = options.cases or [name for name in CASES if name != "tiny"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__}
    print(f"{device}, torch {torch.__version__}, bf16 with fp32 masters; MFU causal/full", flush=True)

    def keep(name: str, row: dict[str, Any], line: str) -> None:
        results[name] = row
        print(line, flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")

    for name in ("numerics", "alone", "together"):
        row = measured(name)
        keep(name, row, f"{name}: {json.dumps(row)}")
    for name in cases:
        rows: dict[str, dict[str, Any]] = {}
        wanted = [each for each in options.variants if CASES[name].packed or not VARIANTS[each].packed]
        for variant in ("unchanged", *wanted):  # the first one twice, to see the noise
            title = f"{name}, {variant}{' again' if variant in rows else ''}"
            rows[variant] = row = fitting(name, variant, options.steps)
            keep(title, row, shown(title, row))
        if "micro_batch" in rows["unchanged"] and not CASES[name].config.moe.experts:
            row = measured("plain", name, str(rows["unchanged"]["micro_batch"]), str(options.steps))
            keep(f"{name}, plain", row, shown(f"{name}, plain PyTorch, compiled", row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
