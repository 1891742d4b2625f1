"""What saving and loading cost, beside plain torch and a raw write of the same bytes, in one process.

    python benchmarks/checkpoint.py [--megabytes 480] [--rounds 7] [--directory DIR] [--json FILE]

A real engine (one rank over gloo, ZeRO-1, fp32) holds weights and both moments of a Llama. All take turns, so that
whatever else the machine and its disk do meets each of them; medians are printed, and of ratios the median of each
turn's ratio. Every write is flushed to the disk (fsync) and followed by the removal of the one before, as ours is; a
`cold` read comes after the files were dropped from the page cache, a `warm` one after they were read.

save        ours: hashes, manifest, flushes and commit included; torch.save of one dictionary; the same bytes in writes
            of 16 MiB
stall       of an asynchronous save: what training waits for when it begins, and once more before the next update, after
            the forward and backward passes of one micro-batch; as a share of a synchronous save. What those passes lose
            to the copy and to the writing beside them is shown apart: passes beside a save over passes alone
memory      the highest resident size during it over that before
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

sys.path.append(str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from engines import engine_of

from model.config import ModelConfig
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.load import load
from parallel.checkpoint.manifest import step_name
from parallel.checkpoint.retention import Retention
from parallel.common.files import write_json
from parallel.common.stateful import Stateful
from parallel.config import ParallelConfig
from parallel.engine import Engine

HIDDEN, VOCABULARY, SEQUENCE = 512, 8192, 64
MEGABYTE = 1e6
CHUNK_BYTES = 1 << 24


TOKENS = torch.arange(SEQUENCE)[None]
BATCH = {
    "tokens": TOKENS,
    "labels": TOKENS,
    "loss_weights": torch.ones(1, SEQUENCE),
    "positions": TOKENS,
    "document_ids": torch.zeros(1, SEQUENCE, dtype=torch.int32),
    "sample_ids": torch.zeros(1, dtype=torch.int64),
}


def make_engine(megabytes: float) -> Engine:
    """An engine whose checkpoint is about so large."""
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN
    layers = max(1, round((megabytes * MEGABYTE / 12 - VOCABULARY * HIDDEN) / layer))
    model = ModelConfig(layers=layers, hidden_size=HIDDEN, heads=8, ffn_hidden_size=4 * HIDDEN, tie_embeddings=True)
    layout = ParallelConfig(zero_stage=1)
    return engine_of(model, vocabulary_size=VOCABULARY, sequence=SEQUENCE, micro_batch=1, layout=layout)


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one turn cost."""

    seconds: float
    memory_bytes: int


def resident_bytes(name: str) -> int:
    """`VmRSS` now or `VmHWM`, the highest since it was reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def spent(work: Callable[[], Any]) -> Spent:
    """Time and highest additional memory."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    started = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - started
    del kept
    return Spent(seconds=seconds, memory_bytes=max(0, resident_bytes("VmHWM") - before))


def drop_from_cache(path: Path) -> None:
    """So that the next read comes from the disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def flush(path: Path) -> None:
    """File and name to the disk."""
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Bench:
    """The turns, over one engine's state in one directory."""

    def __init__(self, directory: Path, megabytes: float) -> None:
        self.directory = directory
        self.engine = make_engine(megabytes)
        self.participants: dict[str, Stateful] = self.engine.participants()
        states = [self.participants[name].state_dict() for name in ("model", "optimizer")]
        self.tensors = {key: shard.data for state in states for key, shard in state.items()}
        self.bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        for tensor in self.tensors.values():
            tensor.uniform_()
        self.waiting, self.beside = (self._checkpoints(name, name == "beside") for name in ("waiting", "beside"))
        self.step = 0

    def _checkpoints(self, name: str, asynchronous: bool) -> Checkpoints:
        return Checkpoints(
            self.directory / name,
            retention=Retention(newest=1),
            fence=Fence(attempt="bench", holder=lambda: "bench"),
            layout={},
            config={},
            group=cast(dist.ProcessGroup, dist.new_group(backend="gloo")),
            asynchronous=asynchronous,
        )

    def raw(self) -> None:
        """The same bytes, in large writes, flushed."""
        path, before = (self.directory / f"raw-{step}" for step in (self.step, self.step - 1))
        with path.open("xb", buffering=0) as file:
            for tensor in self.tensors.values():
                content = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                for start in range(0, len(content), CHUNK_BYTES):
                    file.write(content[start : start + CHUNK_BYTES])
        flush(path)
        before.unlink(missing_ok=True)

    def torch_save(self) -> None:
        """One file of a dictionary, flushed."""
        path, before = (self.directory / f"torch-{step}" for step in (self.step, self.step - 1))
        torch.save(self.tensors, path)
        flush(path)
        before.unlink(missing_ok=True)

    def torch_load(self) -> Any:
        """Into new memory."""
        return torch.load(self.directory / f"torch-{self.step}", weights_only=True)

    def raw_read(self) -> None:
        """Into one buffer again and again."""
        buffer = bytearray(CHUNK_BYTES)
        with (self.directory / f"raw-{self.step}").open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def save(self) -> None:
        """As a run does it."""
        self.waiting.save(self.step, self.participants)

    def save_beside(self) -> tuple[Spent, Spent]:
        """What training waits for, and the passes of a micro-batch meanwhile."""
        begun = spent(lambda: self.beside.save(self.step, self.participants))
        passes = spent(lambda: self.engine.accumulate(BATCH))
        before_update = spent(self.beside.copied)
        self.beside.wait()
        waited = Spent(
            seconds=begun.seconds + before_update.seconds,
            memory_bytes=begun.memory_bytes + before_update.memory_bytes,
        )
        return waited, passes

    def load(self) -> None:
        """As a run does it: every file verified, then into the engine's memory."""
        load(self.checkpoint, self.participants)

    @property
    def checkpoint(self) -> Path:
        """The newest."""
        return self.directory / "waiting" / step_name(self.step)

    def turn(self) -> dict[str, Spent]:
        """Everything once, in an order that changes."""
        self.step += 1
        found: dict[str, Spent] = {}
        writes = [("raw write", self.raw), ("ours", self.save), ("torch.save", self.torch_save)]
        for name, work in writes[self.step % 3 :] + writes[: self.step % 3]:
            found[name] = spent(work)
        found["passes alone"] = spent(lambda: self.engine.accumulate(BATCH))
        found["stall"], found["passes beside a save"] = self.save_beside()
        reads = (
            ("raw read", self.raw_read, self.directory / f"raw-{self.step}"),
            ("torch.load", self.torch_load, self.directory / f"torch-{self.step}"),
            ("our load", self.load, self.checkpoint),
        )
        for name, work, path in reads:
            drop_from_cache(path)
            found[f"{name}, cold"] = spent(work)
            found[f"{name}, warm"] = spent(work)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=480, help="of weights and moments together, about")
    parser.add_argument("--rounds", type=int, default=7, help="turns that count, after one that does not")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured (a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        bench = Bench(Path(name), options.megabytes)
        torch.ones(8 * bench.bytes, dtype=torch.uint8)  # a virtual machine pays for memory when it is first touched
        bench.turn()
        turns = [bench.turn() for _ in range(options.rounds)]
    dist.destroy_process_group()
    figures = show(bench, turns)
    if options.json:
        write_json(options.json, figures)
    return 0


def show(bench: Bench, turns: list[dict[str, Spent]]) -> dict[str, Any]:
    """Prints the table; returns it."""

    def ratio(above: str, below: str) -> float:
        return statistics.median(turn[above].seconds / turn[below].seconds for turn in turns)

    megabytes = bench.bytes / MEGABYTE
    print(f"{megabytes:.0f} MB in {len(bench.tensors)} tensors, {len(turns)} turns, torch {torch.__version__}, medians")
    print(f"{'':<20}{'seconds':>10}{'MB/s':>10}{'memory':>12}")
    rows = {}
    for name in turns[0]:
        seconds = statistics.median(turn[name].seconds for turn in turns)
        memory = statistics.median(turn[name].memory_bytes for turn in turns)
        rows[name] = {"seconds": seconds, "megabytes_per_second": megabytes / seconds, "memory_bytes": memory}
        print(f"{name:<20}{seconds:>10.3f}{megabytes / seconds:>10.0f}{memory / MEGABYTE:>9.0f} MB")
    ratios = {
        "our save at ... of the raw write's speed": ratio("raw write", "ours"),
        "torch.save at ... of the raw write's speed": ratio("raw write", "torch.save"),
        "stall of an asynchronous save over a synchronous one": ratio("stall", "ours"),
        "passes beside an asynchronous save over passes alone": ratio("passes beside a save", "passes alone"),
        "our load at ... of torch.load's speed, cold": ratio("torch.load, cold", "our load, cold"),
        "our load at ... of torch.load's speed, warm": ratio("torch.load, warm", "our load, warm"),
    }
    for text, value in ratios.items():
        print(f"{value:6.3f}  {text}")
    return {"bytes": bench.bytes, "rows": rows, "ratios": ratios}


if __name__ == "__main__":
    sys.exit(main())
