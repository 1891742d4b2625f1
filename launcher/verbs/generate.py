"""`bloomery generate`: finds the checkpoint and hands the prompts over.

The quick half: it imports no torch. `launcher.generate` decodes, on one rank whatever layout saved the checkpoint.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.places import Checkpoint, find_checkpoint
from launcher.verbs.train import positive
from launcher.work import Ranks, Work, from_environment
from parallel.common.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateJob:
    """Texts to continue."""

    checkpoint: Checkpoint
    prompts: tuple[str, ...]
    tokens: int
    """New tokens at most, for each prompt."""
    temperature: float
    """0 takes the likeliest token; above, tokens are drawn from the softmax of logits / temperature."""
    seed: int
    output: Path | None
    ranks: Ranks


def main(arguments: Sequence[str]) -> Work:
    """Parses `CHECKPOINT --prompt TEXT [--prompt TEXT ...] [--tokens N] [--temperature T] [--seed N] [--json FILE]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery generate",
        description="Continues texts with the model of a checkpoint; they are kept in samples.jsonl in the run.",
        epilog='example: bloomery generate first --prompt "def read(path):" --tokens 64 --temperature 0.8',
    )
    parser.add_argument("checkpoint", help="a step directory, a run (its newest step), or RUN@STEP")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="new tokens at most (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, where the temperature is above 0 (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write prompts and continuations here too")
    options = parser.parse_args(list(arguments))
    if not options.temperature >= 0:
        raise UserError(f"--temperature is {options.temperature}: expected 0 or more.")
    ranks = from_environment()
    if ranks.world_size > 1:
        raise UserError("generate works on one rank: call it without torchrun or srun.")
    checkpoint = find_checkpoint(options.checkpoint)
    job = GenerateJob(
        checkpoint=checkpoint,
        prompts=tuple(options.prompt),
        tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
        output=options.json,
        ranks=ranks,
    )
    return Work(module="launcher.generate", job=job, rank=0, logs=checkpoint.run.logs)
