"""Fifty steps of the quickstart in every layout: the same real text, the same losses.

    make quickstart                      # once: builds stores/quickstart
    python -m tests.accept_layouts       # some minutes; a table, and exit code 1 where a curve leaves the others

Each layout is a run of `bloomery train` as a user starts it, in fp32, on the same store. The first is one rank, and the
second one rank again with smaller micro-batches: it is the control, because all that it changes is the order of sums.
Training at this learning rate multiplies a rounding error by some hundreds in fifty steps, so that the control itself
leaves 1e-5 before the end. Layouts are held to 1e-5 for the first ten steps, and to 1e-4 for all fifty.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EARLY, LATE = 1e-5, 1e-4
"""Largest relative difference of a loss in the first `FIRST` steps, and in all of them."""
FIRST = 10
LAYOUTS: dict[str, tuple[int, Sequence[str]]] = {
    "one rank": (1, ["parallel.zero_stage=0"]),
    "control: one rank": (1, ["parallel.zero_stage=0", "train.micro_batch_size=1"]),
    "DP2, stage 0": (2, ["parallel.zero_stage=0"]),
    "DP2, ZeRO-1": (2, ["parallel.zero_stage=1"]),
    "DP2, ZeRO-2": (2, ["parallel.zero_stage=2"]),
    "DP2, ZeRO-3": (2, ["parallel.zero_stage=3"]),
    "TP2 with SP": (2, ["parallel.tensor=2"]),
    "TP2 without SP": (2, ["parallel.tensor=2", "parallel.sequence_parallel=false"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "CP2": (2, ["parallel.context=2"]),
    "TP2 x PP2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "TP2 x CP2": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "PP2 x DP2, ZeRO-2": (4, ["parallel.pipeline=2", "parallel.zero_stage=2"]),
    "DP2, recomputed": (2, ["parallel.recompute.mode=full"]),
}


def losses(name: str, ranks: int, overrides: Sequence[str], *, store: Path, steps: int, directory: Path) -> list[float]:
    """Trains in a directory of its own and reads what was logged."""
    run = directory / name.replace(" ", "-").replace(",", "")
    command = [sys.executable, "-P", "-m", "launcher", "train", str(ROOT / "configs/quickstart.yaml")]
    common = [
        f"run.dir={run}", f"data.store={store}", f"train.steps={steps}", "train.log_every_steps=1",
        "evaluate.every_steps=null", f"checkpoint.every_steps={10 * steps}", "tracking.wandb.mode=disabled",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, *common, *overrides, "--ranks", str(ranks)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> int:
    """Compares every layout with the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "stores/quickstart", help="a finished store")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", default="", help="layouts whose name has this in it (and one rank)")
    arguments = parser.parse_args()
    failed, reference = False, None
    with tempfile.TemporaryDirectory() as directory:
        for name, (ranks, overrides) in LAYOUTS.items():
            if reference is not None and arguments.only not in name:
                continue
            started = time.monotonic()
            found = losses(
                name, ranks, overrides, store=arguments.store, steps=arguments.steps, directory=Path(directory)
            )
            assert len(found) == arguments.steps
            reference = reference or found
            errors = [abs(ours / theirs - 1) for ours, theirs in zip(found, reference, strict=True)]
            early, late = max(errors[:FIRST]), max(errors)
            wrong = early > EARLY or late > LATE
            failed |= wrong
            print(
                f"{name:<20} last loss {found[-1]:.6f}   first {FIRST} {early:.1e}   all {late:.1e}"
                f"   {time.monotonic() - started:4.0f} s{'   WRONG' if wrong else ''}",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
