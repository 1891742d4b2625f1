"""`bloomery generate`: loads the checkpoint on this one rank and says what it writes."""

from typing import Any

from launcher.generation.filling import Filler
from launcher.generation.streaming import Streamer
from launcher.generation.writer import Writer
from launcher.outcome import Outcome
from launcher.runtime import in_ranks
from launcher.verbs.generate import GenerateJob, facts, keep, show
from launcher.work import Ranks
from model import families


def work(job: GenerateJob) -> int:
    """Writes what follows the prompts; returns the exit code."""
    return in_ranks(lambda ranks: _generated(job, ranks), job.ranks)


def _generated(job: GenerateJob, ranks: Ranks) -> Outcome:
    encoder = families.family(job.checkpoint.config().model).architecture is families.Architecture.encoder
    samples = _filled(job) if encoder else _written(job)
    keep(job, samples)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"{len(samples)} texts continued")


def _filled(job: GenerateJob) -> list[dict[str, Any]]:
    filler, samples = Filler.of(job.checkpoint), []
    for prompt in job.prompts:
        text, candidates = filler.fill(prompt)
        samples.append({**facts(job), "prompt": prompt, "continuation": text, "candidates": candidates})
        show(samples[-1:])
    return samples


def _written(job: GenerateJob) -> list[dict[str, Any]]:
    writer, samples = Writer.of(job.checkpoint), []
    apart = writer.two_stacks or job.chat
    for prompt in job.prompts:
        turns = [{"role": "system", "content": job.system}] if job.system else []
        ids = writer.read_turns([*turns, {"role": "user", "content": prompt}]) if job.chat else writer.read(prompt)
        streamer = None
        if job.streams:
            print(prompt, end="\n> " if apart else "", flush=True)
            special = writer.tokenizer.special_ids()
            streamer = Streamer(
                writer.tokenizer.decode, _say, ends=special, stop=job.options.stop, prompt=not writer.two_stacks
            )
        (text,) = writer.write([ids], job.options, chat=job.chat, streamer=streamer)
        samples.append({**facts(job), "prompt": prompt, "continuation": text, "apart": apart})
        if job.streams:
            print("\n", flush=True)
        else:
            show(samples[-1:])
    return samples


def _say(text: str) -> None:
    print(text, end="", flush=True)
