"""The lesson of docs/tutorial.md as its reader takes it: `python -m tests.accept_tutorial [DIRECTORY]`.

Runs every command of the page in its order, through a shell, in a scratch directory in which configs and docs stand as
links; then asks what the page promises: the validation loss falls, the classifier is above the majority class and above
the same model from scratch, BLEU rises by being taught, no trigram of the text that was generated with beams comes
twice, and all of it within twenty minutes. Prints a line each; exit code 1 where one fails.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
MOST_MINUTES = 20
_COMMAND = re.compile(r"^ {4}((?:bloomery|python) .*)$", re.MULTILINE)


def commands() -> list[str]:
    """The page's commands, each as a shell runs it here."""
    python = f"{sys.executable} -P"
    found = [re.sub(r"^bloomery", f"{python} -m launcher", each) for each in _COMMAND.findall(PAGE.read_text())]
    return [re.sub(r"^python ", f"{python} ", each) for each in found]


def lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def figure(run: Path, task: str, name: str) -> float:
    """The newest figure of a task."""
    return next(each[name] for each in reversed(lines(run / "tasks.jsonl")) if each["task"] == task)


def promises(directory: Path) -> Iterator[tuple[str, bool]]:
    """What the page says, with its numbers, and whether it is so."""
    runs = directory / "runs"
    seen = [each["validation_loss"] for each in lines(runs / "lesson" / "metrics.jsonl") if "validation_loss" in each]
    yield f"perplexity falls: {', '.join(f'{2.718281828**loss:.3f}' for loss in seen)}", seen == sorted(seen)[::-1]
    overall = json.loads((runs / "lesson" / "evaluation.json").read_text())["overall"]
    model, unigram = overall["bits_per_byte"], overall["unigram_bits_per_byte"]
    yield f"bits per byte {model:.3f}, of unigrams {unigram:.3f}", model < 0.5 * unigram
    labels = [each["label"] for each in lines(directory / "tutorial" / "labels-test.jsonl")]
    majority = max(labels.count(each) for each in labels) / len(labels)
    tuned, scratch = (figure(runs / name, "labels", "accuracy") for name in ("classes", "scratch"))
    said = f"accuracy {tuned:.3f} of the majority's {majority:.3f} and {scratch:.3f} from scratch"
    yield said, tuned > max(majority, scratch)
    before, after = (figure(runs / name, "translate", "bleu") for name in ("lesson", "chat"))
    yield f"BLEU rises from {before:.1f} to {after:.1f}", after > before + 20
    tokenizer = Tokenizer.load(directory / "stores" / "lesson")
    for run in ("lesson", "chat"):
        for sample in lines(runs / run / "samples.jsonl"):
            if sample["beams"] > 1:
                ids = tokenizer.encode_batch([sample["continuation"]])[0]
                trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
                yield f"no trigram twice in {sample['continuation']!r}", len(set(trigrams)) == len(trigrams) > 0


def main() -> int:
    """Runs the lesson."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="bloomery-tutorial-"))
    directory.mkdir(exist_ok=True)
    for name in ("configs", "docs"):
        if not (directory / name).exists():
            (directory / name).symlink_to(ROOT / name)
    started = time.monotonic()
    for command in commands():
        print(f"$ {command}", flush=True)
        subprocess.run(command, shell=True, cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    minutes = (time.monotonic() - started) / 60
    found = [*promises(directory), (f"{minutes:.1f} minutes", minutes < MOST_MINUTES)]
    for said, holds in found:
        print(f"{'holds' if holds else 'FAILS'}  {said}")
    return 0 if all(holds for _, holds in found) else 1


if __name__ == "__main__":
    sys.exit(main())
