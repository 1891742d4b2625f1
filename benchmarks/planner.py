"""The planner's arithmetic beside published step times: `python benchmarks/planner.py [--fit | --layouts]`.

benchmarks/planner_data/published.csv has what Megatron-LM (as itself and in NeMo), torchtitan and llm-foundry publish
with everything that the arithmetic asks for, and where. Of each program on each accelerator every other row calibrates
(the first, third ...) and the others are held out: nobody chose. `--fit` searches, on the first half alone, the shares
of the peaks that stand in configs/hardware and the shares of communication below, and prints them; it writes nothing.

What a row does not say is assumed for all rows alike: no recomputation in NeMo's, 80 % of a pass can hide collectives.
FP8 rows test pipelines, links and batches at scales for which nobody publishes bf16; their matrix products have a
share of their own, which the planner itself does not use.
"""

import argparse
import csv
import itertools
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launcher import config as configuration  # noqa: E402
from launcher.config import RunConfig, TrainConfig  # noqa: E402
from launcher.plan.facts import Facts  # noqa: E402
from launcher.plan.hardware import Hardware, load  # noqa: E402
from launcher.plan.search import Search  # noqa: E402
from launcher.plan.seconds import step_seconds  # noqa: E402
from launcher.plan.setting import Setting, Software  # noqa: E402
from launcher.plan.show import in_words  # noqa: E402
from launcher.plan.stages import balanced_split  # noqa: E402
from model.config import Activation, ModelConfig, MoeConfig  # noqa: E402
from parallel.common.units import format_bytes  # noqa: E402
from parallel.config import ParallelConfig, Precision, Recompute, RecomputeConfig  # noqa: E402

PUBLISHED = Path(__file__).parent / "planner_data" / "published.csv"
SOFTWARE = {
    # Transformer Engine's kernels; collectives overlap with products, gradients with backward and weights with forward.
    "megatron": Software(
        tensor=0.02,
        context=0.69,
        gathers_ahead=True,
        reduces_early=True,
        fused=True,
        block_seconds=2e-4,
        gradient_width=2,  # NeMo's mixed precision reduces gradients in bf16
    ),
    "megatron-2022": Software(tensor=1.0, gathers_ahead=False, fused=True, block_seconds=5e-4),
    "torchtitan": Software(fused=False, block_seconds=1e-3),
    "torchtitan-compiled": Software(fused=True, block_seconds=5e-4),
    "llm-foundry": Software(fused=False, block_seconds=1e-3),
}
FP8 = {"h100": 0.57, "b200": 0.41, "h100-500w": 0.56}
"""Share of the fp8 peak that matrix products reach, their quantisation included."""
ATTENTION = {"megatron-2022 a100": 0.12, "llm-foundry a100": 0.36, "llm-foundry h100": 0.21}
"""Shares of those that had no attention of today's: one without a fused kernel, one with the first."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A published figure and what it is of."""

    held_out: bool
    setting: Setting
    software: str
    machine: str
    matrices: str
    name: str
    tokens_per_second_per_gpu: float
    source: str

    @property
    def measured(self) -> float:
        """Seconds of a step."""
        return self.setting.tokens / (self.tokens_per_second_per_gpu * self.setting.ranks)

    @property
    def predicted(self) -> float:
        return sum(step_seconds(self.setting).values())


_loaded = cache(load)


def rows(tuned: Mapping[str, float] | None = None) -> Iterator[Row]:
    """Every row; `tuned` replaces constants by name, as `--fit` does."""
    tuned = tuned or {}
    seen: dict[tuple[str, str, str], int] = defaultdict(int)
    with PUBLISHED.open() as file:
        for read in csv.DictReader(file):
            group = (read["software"], read["hardware"], read["matrices"])
            seen[group] += 1
            yield _row(read, held_out=seen[group] % 2 == 0, tuned=tuned)


def _row(read: Mapping[str, str], *, held_out: bool, tuned: Mapping[str, float]) -> Row:
    number = {name: int(value) for name, value in read.items() if value.isdigit()}
    model = ModelConfig(
        layers=number["layers"],
        hidden_size=number["hidden"],
        heads=number["heads"],
        kv_heads=number["kv_heads"],
        ffn_hidden_size=number["ffn"],
        activation=Activation.swiglu if number["gated"] else Activation.gelu,
        moe=MoeConfig(experts=number["experts"], top_k=number["top_k"] or 2),
    )
    layout = ParallelConfig(
        tensor=number["tensor"],
        pipeline=number["pipeline"],
        virtual_pipeline=number["virtual_pipeline"],
        pipeline_split=balanced_split(model.layers, number["pipeline"] * number["virtual_pipeline"]),
        context=number["context"],
        expert=number["expert"],
        zero_stage=number["zero_stage"],
        recompute=_recompute(read["recompute"], model.layers),
    )
    machine = Path(read["hardware"]).stem
    setting = Setting(
        facts=Facts.of(model, vocabulary_size=number["vocabulary"], sequence_length=number["sequence"]),
        global_batch_size=number["global_batch"],
        micro_batch_size=number["micro_batch"],
        layout=layout,
        ranks=number["gpus"],
        node_ranks=8,
        precision=Precision.fp16 if read["matrices"] == "fp16" else Precision.bf16,
        hardware=_hardware(read, machine, tuned),
        software=_software(read["software"], tuned),
        matrix_precision=read["matrices"],
    )
    rate = float(read["tokens_per_second_per_gpu"] or 0)
    if not rate:
        rate = float(read["mfu_full"]) * setting.hardware.peak(read["matrices"]) / setting.facts.flops[False]
    return Row(
        held_out=held_out,
        setting=setting,
        software=read["software"],
        machine=machine,
        matrices=read["matrices"],
        name=read["model"],
        tokens_per_second_per_gpu=rate,
        source=read["source"],
    )


def _recompute(said: str, layers: int) -> RecomputeConfig:
    """torchtitan's selective recomputation keeps every other matrix product: `half` of a forward pass comes again."""
    if said == "half":
        return RecomputeConfig(mode=Recompute.full, blocks=layers // 2)
    return RecomputeConfig(mode=Recompute(said))


def _hardware(read: Mapping[str, str], machine: str, tuned: Mapping[str, float]) -> Hardware:
    hardware = _loaded(read["hardware"] if machine == read["hardware"] else str(ROOT / read["hardware"]))
    share = hardware.efficiency
    share = replace(
        share,
        matrices=tuned.get(f"matrices {machine}", share.matrices),
        attention=tuned.get(f"attention {machine}", share.attention),
        links=tuned.get("links", share.links),
    )
    if read["matrices"] == "fp8":
        share = replace(share, matrices=tuned.get(f"fp8 {machine}", FP8[machine]))
    old = f"{read['software']} {machine}"
    if old in ATTENTION:
        share = replace(share, attention=tuned.get(f"attention {old}", ATTENTION[old]))
    return replace(hardware, efficiency=share)


def _software(name: str, tuned: Mapping[str, float]) -> Software:
    software = SOFTWARE[name]
    if name == "megatron":
        return replace(
            software,
            tensor=tuned.get("megatron tensor", software.tensor),
            context=tuned.get("megatron context", software.context),
        )
    return software


def error(row: Row) -> float:
    """Predicted over measured, less one."""
    return row.predicted / row.measured - 1


def fit() -> dict[str, float]:
    """The constants that bring the calibrating half closest, by turns over a falling step."""
    names = [f"matrices {machine}" for machine in ("h100", "a100", "h100-500w")]
    names += [f"fp8 {machine}" for machine in FP8] + [f"attention {machine}" for machine in FP8]
    names += [f"attention {old}" for old in ATTENTION]
    names += ["megatron tensor", "megatron context"]
    tuned = dict.fromkeys(names, 0.6)

    def cost(trial: Mapping[str, float]) -> float:
        errors = [math.log1p(error(row)) ** 2 for row in rows(trial) if not row.held_out]
        # A weak pull to the middle decides what the figures leave open.
        return statistics.fmean(errors) + 1e-4 * sum((value - 0.6) ** 2 for value in trial.values())

    best = cost(tuned)
    for step in (0.2, 0.1, 0.05, 0.02, 0.01):
        for _, name, sign in itertools.product(range(2), names, (1, -1)):
            trial = {**tuned, name: min(1.0, max(0.02, tuned[name] + sign * step))}
            if (found := cost(trial)) < best:
                best, tuned = found, trial
    return {name: round(value, 3) for name, value in tuned.items()}


def table(found: Sequence[Row]) -> list[str]:
    """As Markdown."""
    lines = [
        "| program | accelerators | model | sequence | batch | layout | step, measured | predicted | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        setting = row.setting
        batch = f"{setting.global_batch_size} / {setting.micro_batch_size}"
        lines.append(
            f"| {row.software} {row.matrices} | {setting.ranks} {row.machine} | {row.name} | {setting.sequence_length} "
            f"| {batch} | {_layout(setting.layout)} | {row.measured:.2f} s | {row.predicted:.2f} s "
            f"| {error(row):+.0%} |"
        )
    return lines


def _layout(layout: ParallelConfig) -> str:
    named = {
        "TP": layout.tensor,
        "PP": layout.pipeline,
        "VP": layout.virtual_pipeline,
        "CP": layout.context,
        "EP": layout.expert,
    }
    parts = [f"{name}{degree}" for name, degree in named.items() if degree > 1]
    if layout.recompute.mode is not Recompute.none:
        parts.append(f"recompute {layout.recompute.mode.value}")
    return " ".join([*parts, f"ZeRO-{layout.zero_stage}"])


LAYOUTS = (
    ("llama-8b", 128256, 8192, 128, (8, 64, 1024), "8: FSDP (torchtitan), context 2 (NeMo)"),
    (
        "llama-70b",
        128256,
        8192,
        256,
        (64, 256, 1024),
        "64: TP4 PP4 VP5 CP2, TP4 PP8 VP5 (NeMo); 256: FSDP 32, TP8 (torchtitan)",
    ),
    ("llama-405b", 128256, 8192, 2048, (512, 1024), "1,024: TP8 PP8 VP8 CP2 (NeMo); 8,192: TP8 PP16 (Llama 3)"),
    ("mixtral-8x7b", 32000, 4096, 1024, (8, 64, 1024), "64: EP8 on 180 GB (NeMo)"),
)
"""Model, vocabulary, sequence, least global batch, numbers of H100, and what was published."""


def layouts() -> Iterator[str]:
    """The best layouts of well-known models beside the published ones, as Markdown."""
    columns = "model, H100, best, micro-batch, recompute, memory, step, MFU causal / full, searched in, published"
    yield f"| {columns.replace(', ', ' | ')} |"
    yield f"|{'---|' * len(columns.split(', '))}"
    for name, vocabulary, sequence, batch, counts, published in LAYOUTS:
        model = replace(configuration.load([ROOT / f"configs/model/{name}.yaml"]).model, vocabulary_size=vocabulary)
        facts = Facts.of(model, vocabulary_size=vocabulary, sequence_length=sequence)
        for count in counts:
            samples = max(batch, count)
            setting = Setting(
                facts=facts,
                global_batch_size=samples,
                micro_batch_size=1,
                layout=ParallelConfig(),
                ranks=count,
                node_ranks=8,
                precision=Precision.bf16,
                hardware=load("h100"),
            )
            train = TrainConfig(steps=1000, global_batch_size=samples, sequence_length=sequence)
            started = time.process_time()
            plan = Search(RunConfig(model=model, train=train), setting).plan(1)
            took = time.process_time() - started
            if not plan.best:
                yield f"| {name} | {count:,} | none fits | | | | | | {took:.2f} s | |"
                continue
            best, found = plan.best[0].setting, plan.best[0].estimate
            assert found is not None
            again, held = best.layout.recompute.mode.value, format_bytes(found.bytes_total)
            yield (
                f"| {name} | {count:,} | {in_words(best)} | {best.micro_batch_size} | {again} "
                f"| {held} | {found.step_seconds:.2f} s "
                f"| {found.mfu_causal:.0%} / {found.mfu_full:.0%} | {took:.2f} s | {published} |"
            )
            published = ""


def summary(name: str, found: Sequence[Row]) -> str:
    """How far off, in one line."""
    errors = sorted(abs(error(row)) for row in found)
    within = sum(one <= 0.2 for one in errors)
    return (
        f"{name}: {within} of {len(errors)} within 20 %; median error {statistics.median(errors):.0%}, "
        f"mean {statistics.fmean(errors):.0%}, largest {errors[-1]:.0%}"
    )


def main() -> None:
    """Prints the table and how far off it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="search the constants on the calibrating half, print them")
    parser.add_argument("--layouts", action="store_true", help="the best layouts of well-known models instead")
    options = parser.parse_args()
    if options.layouts:
        print("\n".join(layouts()))
        return
    if options.fit:
        for name, value in fit().items():
            print(f"{name}: {value}")
        return
    found = list(rows())
    for held_out in (False, True):
        half = [row for row in found if row.held_out is held_out]
        title = "Held out" if held_out else "Calibrated on"
        print(f"## {title}\n")
        print("\n".join(table(half)))
        print()
        print(summary(title, half))
        for programs in (("megatron", "megatron-2022"), ("torchtitan", "torchtitan-compiled"), ("llm-foundry",)):
            print(f"- {summary(programs[0], [row for row in half if row.software in programs])}")
        print()


if __name__ == "__main__":
    main()
