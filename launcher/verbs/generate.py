"""`bloomery generate`: finds the checkpoint and hands the prompts over.

The quick half: it imports no torch. `launcher.generation` decodes, on one rank whatever layout saved the checkpoint.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.generation.options import Options
from launcher.places import Checkpoint, find_checkpoint
from launcher.verbs.train import positive
from launcher.work import Ranks, Work, from_environment
from parallel.common.errors import UserError
from parallel.common.files import hash_file, write_json

_DESCRIPTION = """\
Continues texts with the model of a checkpoint; they are kept in samples.jsonl in the run. A BERT fills in what stands
as [MASK] in the prompt; a T5 answers the prompt, or tells what stands as [MASK] in it. Needs
transformers (extra hf)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateJob:
    """Texts to continue."""

    checkpoint: Checkpoint
    prompts: tuple[str, ...]
    options: Options
    chat: bool
    """A prompt is what a user says, and the assistant answers."""
    system: str | None
    """What stands before it in a conversation."""
    streams: bool
    """Say every word when it is there."""
    output: Path | None
    ranks: Ranks


def main(arguments: Sequence[str]) -> int | Work:
    """Parses `CHECKPOINT [--prompt TEXT ...] [--file FILE] [--chat] [how to decode] [--json FILE]`."""
    options = _parser().parse_args(list(arguments))
    decoding = Options(
        tokens=options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        beams=options.beams,
        length_penalty=options.length_penalty,
        no_repeat_ngram=options.no_repeat_ngram,
        stop=tuple(options.stop),
        seed=options.seed,
    )
    for problem in decoding.problems():
        raise UserError(problem)
    if options.system is not None and not options.chat:
        raise UserError("--system is for --chat: it stands before a conversation.")
    ranks = from_environment()
    if ranks.world_size > 1:
        raise UserError("generate works on one rank: call it without torchrun or srun.")
    checkpoint = find_checkpoint(options.checkpoint)
    if checkpoint.config().model.classes.number:
        raise UserError(f"{checkpoint.path} tells classes apart and writes no text: `bloomery evaluate` measures it.")
    job = GenerateJob(
        checkpoint=checkpoint,
        prompts=tuple([*options.prompt, *_lines(options.file)] or [""]),
        options=decoding,
        chat=options.chat,
        system=options.system,
        streams=decoding.beams == 1 and sys.stdout.isatty(),
        output=options.json,
        ranks=ranks,
    )
    standing = samples(job)
    if standing is not None:
        show(standing)
        keep(job, standing)
        return 0
    return Work(module="launcher.generation.work", job=job, rank=0, logs=checkpoint.run.logs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bloomery generate",
        description=_DESCRIPTION,
        epilog='example: bloomery generate first --prompt "def read(path):" --tokens 64 --temperature 0.8 --top-p 0.9',
    )
    parser.add_argument("checkpoint", help="a step directory, a run (its newest step), or RUN@STEP")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT",
        help="may be given several times (default: the start of a document)",
    )  # fmt: skip
    parser.add_argument("--file", metavar="FILE", help="a prompt a line; - reads standard input")
    parser.add_argument("--chat", action="store_true", help="a prompt is a user's turn, and the assistant answers it")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the system says first")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="new tokens at most (default 64)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make P together")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="hypotheses that are followed (default 1)")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X", help="with beams: above 1 favours long texts (1)"
    )
    parser.add_argument(
        "--no-repeat-ngram", type=int, default=0, metavar="N", help="no N tokens in a row come twice (0: they may)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the draw, where the temperature is above 0 (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write prompts and continuations here too")
    return parser


def _lines(file: str | None) -> list[str]:
    """The prompts of a file, a line each; empty lines are passed over."""
    if file is None:
        return []
    if file != "-" and not Path(file).is_file():
        raise UserError(f"--file: there is no file {file}: expected a text file, a prompt a line, or -.")
    content = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    return [line for line in content.splitlines() if line.strip()]


def facts(job: GenerateJob) -> dict[str, Any]:
    """What a continuation depends on besides its prompt."""
    return {
        "checkpoint": job.checkpoint.path.name,
        "checksum": hash_file(job.checkpoint.path / "manifest.json"),
        **asdict(job.options),
        "stop": list(job.options.stop),
        "chat": job.chat,
        "system": job.system,
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
    """Prints prompts and what follows them, answers them, or fills them."""
    for sample in found:
        if "candidates" in sample:
            print(sample["continuation"])
            for candidates in sample["candidates"]:
                print("  " + "  ".join(f"{text.strip()!r} {share:.3f}" for text, share in candidates))
            print(flush=True)
        else:
            between = "\n> " if sample.get("apart") else ""
            print(f"{sample['prompt']}{between}{sample['continuation']}\n", flush=True)


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
