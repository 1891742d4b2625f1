"""How long it takes to begin, and what a step costs beside its passes, its communication and its update.

    python benchmarks/start_up.py [--rounds 5] [--json FILE]

A tiny model on one rank: seconds of `bloomery --help`; seconds from calling `bloomery train` until its first step
stands in metrics.jsonl, beside those of a script that imports torch, or Hugging Face's Trainer, and takes one step of
such a model (with no run to set up, nothing to read and nothing to save); and the seconds of a step of our run that no
phase accounts for (the framework's own: loop, judge, agreement, meter, one line of metrics every fifty steps).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from measure import ENVIRONMENT, REPOSITORY, bloomery, measured

sys.path.append(str(Path(__file__).parents[1]))

from parallel.common.files import write_json
from tests.launcher.tiny import configuration, make_store

STEPS, WINDOW = 400, 50
PHASES = ("data", "forward_backward", "communication", "optimizer", "save")


def first_step(config: Path, run: Path) -> float:
    """Seconds from the call to the first line of metrics."""
    begun = time.monotonic()
    process = subprocess.Popen(bloomery("train", config, f"run.dir={run}"), stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll():
            raise SystemExit("bloomery train failed")
        time.sleep(0.01)
    seconds = time.monotonic() - begun
    process.wait()
    return seconds


def framework_seconds(run: Path) -> float:
    """Of a step: the median over windows of steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = []
    for before, line in pairwise(lines[1:]):
        steps = line["step"] - before["step"]
        elapsed = (line["tokens"] - before["tokens"]) / line["tokens_per_second"]
        phases = sum(line[f"time_{phase}_seconds"] for phase in PHASES)
        found.append((elapsed - phases) / steps)
    return statistics.median(found)


SCRIPTS = {
    "plain PyTorch": """
import torch
from plain import PlainLlama, PlainLoop
from model.config import ModelConfig
model = PlainLlama(ModelConfig(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=176), 512, 64)
loop = PlainLoop(model, learning_rate=1e-3, clip_norm=1.0, dtype=torch.float32)
tokens = torch.randint(0, 512, (4, 64))
loop.step([{"tokens": tokens, "labels": tokens}])
""",
    "Trainer": """
import torch
from trainer import TrainerLoop
from model.config import ModelConfig
model = ModelConfig(layers=2, hidden_size=64, heads=4, kv_heads=2, ffn_hidden_size=176)
TrainerLoop(
    model, vocabulary_size=512, sequence=64, micro_batch=4, micro_batches=1, dtype=torch.float32
).turn(2)
""",
}
"""Importing and a first step (the Trainer's: three, since it tells the time of none before)."""


def script_seconds(script: str) -> float:
    """Of a Python that runs a script and ends."""
    paths = f"{REPOSITORY}:{REPOSITORY / 'benchmarks'}"
    begun = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, env={**ENVIRONMENT, "PYTHONPATH": paths}
    )
    return time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        store = make_store(place / "corpus" / "store")
        train = {"steps": STEPS, "log_every_steps": WINDOW}
        config = configuration(place, store, train=train, checkpoint={"every_steps": STEPS})
        help_seconds, begun = [], []
        scripts: dict[str, list[float]] = {name: [] for name in SCRIPTS}
        for number in range(options.rounds):
            help_seconds.append(measured(bloomery("--help"))[0]["seconds"])
            begun.append(first_step(config, place / f"run-{number}"))
            for name, script in SCRIPTS.items():
                scripts[name].append(script_seconds(script))
        framework = [framework_seconds(place / f"run-{number}") for number in range(options.rounds)]
    figures = {
        "help_seconds": statistics.median(help_seconds),
        "first_step_seconds": statistics.median(begun),
        **{f"{name} first_step_seconds": statistics.median(each) for name, each in scripts.items()},
        "framework_seconds_a_step": statistics.median(framework),
    }
    print(f"bloomery --help      {figures['help_seconds']:.2f} s")
    print(f"the first step after {figures['first_step_seconds']:.1f} s")
    for name in SCRIPTS:
        print(f"  {name:<18} {figures[f'{name} first_step_seconds']:.1f} s")
    print(f"framework            {1000 * figures['framework_seconds_a_step']:.2f} ms a step")
    if options.json:
        write_json(options.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
