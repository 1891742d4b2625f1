"""`bloomery generate`: finds the checkpoint and hands the prompts over.

The quick half: it imports no torch. `launcher.generate` decodes, on one rank whatever layout saved the checkpoint.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.places import Checkpoint, find_checkpoint
from launcher.verbs.train import positive
from launcher.work import Ranks, Work, from_environment
from model import families
from parallel.common.errors import UserError
from parallel.common.files import hash_file, write_json


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


def main(arguments: Sequence[str]) -> int | Work:
    """Parses `CHECKPOINT [--prompt TEXT ...] [--tokens N] [--temperature T] [--seed N] [--json FILE]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery generate",
        description="Continues texts with the model of a checkpoint; they are kept in samples.jsonl in the run.",
        epilog='example: bloomery generate first --prompt "def read(path):" --tokens 64 --temperature 0.8',
    )
    parser.add_argument("checkpoint", help="a step directory, a run (its newest step), or RUN@STEP")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may be given several times (default: the start of a document)",
    )
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
    model = checkpoint.config().model
    if not families.family(model).continues_text:
        raise UserError(
            f"{checkpoint.path} holds a {model.family}, which does not continue texts: "
            "`bloomery evaluate` says what it learnt."
        )
    job = GenerateJob(
        checkpoint=checkpoint,
        prompts=tuple(options.prompt or [""]),
        tokens=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
        output=options.json,
        ranks=ranks,
    )
    standing = samples(job)
    if standing is not None:
        show(standing)
        keep(job, standing)
        return 0
    return Work(module="launcher.generate", job=job, rank=0, logs=checkpoint.run.logs)


def facts(job: GenerateJob) -> dict[str, Any]:
    """What a continuation depends on besides its prompt."""
    return {
        "checkpoint": job.checkpoint.path.name,
        "checksum": hash_file(job.checkpoint.path / "manifest.json"),
        "tokens": job.tokens,
        "temperature": job.temperature,
        "seed": job.seed,
    }


def samples(job: GenerateJob) -> list[dict[str, Any]] | None:
    """The continuations that the run already keeps, if it has exactly these of every prompt."""
    wanted = facts(job)
    found = {
        sample["prompt"]: sample
        for sample in job.checkpoint.run.samples
        if {key: sample.get(key) for key in wanted} == wanted
    }
    return [found[prompt] for prompt in job.prompts] if all(prompt in found for prompt in job.prompts) else None


def show(found: Sequence[Mapping[str, Any]]) -> None:
    """Prints prompts and what follows them."""
    for sample in found:
        print(f"{sample['prompt']}{sample['continuation']}\n", flush=True)


def keep(job: GenerateJob, found: Sequence[Mapping[str, Any]]) -> None:
    """Adds what is new to `samples.jsonl` in the run, and writes `--json`."""
    lines = job.checkpoint.run.samples
    lines.keep(lambda _: True)
    before = list(lines)
    for sample in found:
        if sample not in before:
            lines.append(dict(sample))
    if job.output is not None:
        write_json(job.output, found)
