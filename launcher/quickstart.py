"""`make quickstart`: raw text to a trained model, by the public commands, each shown as you would type it.

There is no other code path: every step below is a subprocess that runs `bloomery VERB`. A second call runs the same
commands again; each of them sees that its work stands and answers at once.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from data_pipeline.store import VALIDATION, Store
from launcher.places import find_run
from launcher.start import repository_environment
from parallel.common.errors import UserError
from parallel.common.files import hash_bytes
from parallel.common.units import format_duration

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.yaml"
_RANKS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One public command and why it is run."""

    meaning: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """What is trained on."""

    name: str
    """Of the run and the store."""
    sources: tuple[str, ...]
    """Overrides that say where the text is."""
    overrides: tuple[str, ...]
    """Overrides for the corpus and the training."""
    prompts: tuple[str, ...]


def main(arguments: Sequence[str]) -> int:
    """Parses `[--data FILE]` and runs the commands one after the other."""
    parser = argparse.ArgumentParser(
        prog="bloomery quickstart",
        description="From raw text to a trained model on this machine: runs the public commands and shows each.",
        epilog="The text is that of Python's library and the installed packages; --data takes your own instead.\n\n"
        "examples:\n  bloomery quickstart\n  bloomery quickstart --data poems.jsonl.gz",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="jsonl, parquet or txt, also .gz or .zst; or a directory"
    )
    options = parser.parse_args(list(arguments))
    config = _config_file()
    text = installed_text() if options.data is None else own_text(options.data)
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    for number, command in enumerate(commands(config, text)):
        if number == 1:
            _check_text(text)
        console.print(f"\n[bold]{escape(command.meaning)}[/bold]")
        console.print(f"[cyan]$ bloomery {escape(_as_typed(command.arguments))}[/cyan]\n")
        code = _run(command.arguments)
        if code:
            if code in (75, 130):
                console.print("\nStopped and saved; call quickstart again, it goes on from here.")
            return code
    _ending(console, text, time.monotonic() - started)
    return 0


def commands(config: Path, text: Text) -> list[Command]:
    """The public commands, in order."""
    run = f"runs/{text.name}"
    prompts = tuple(word for prompt in text.prompts for word in ("--prompt", prompt))
    return [
        Command(
            meaning="1. Corpus: clean, drop duplicates, hold out validation documents, train a tokenizer, make tokens",
            arguments=("data", "build", str(config), *text.sources, *text.overrides),
        ),
        Command(
            meaning="2. Training: two processes share each batch, and the optimizer's state (ZeRO-1)",
            arguments=("train", str(config), *text.overrides, "--ranks", str(_RANKS)),
        ),
        Command(
            meaning="3. Evaluation on documents that training never saw, beside two baselines that know no language",
            arguments=("evaluate", run, "--ranks", str(_RANKS)),
        ),
        Command(
            meaning="4. What the model has learnt to write, taking the likeliest token each time",
            arguments=("generate", run, *prompts, "--tokens", "48"),
        ),
        Command(
            meaning="5. Everything about the run in one file, to open in a browser",
            arguments=("report", run),
        ),
    ]


def _check_text(text: Text) -> None:
    """Refuses text that is too little to hold some of it out, before minutes are spent on it."""
    store = Store.open(Path("stores") / text.name)
    if not store.shards(split=VALIDATION):
        documents = sum(shard.documents for shard in store.shards())
        raise UserError(
            f"{documents} different documents are too few to hold some out for evaluation: give more text "
            "(a line of a jsonl file, a row of a parquet file, or 64 KiB of a txt file is a document)."
        )


def _config_file() -> Path:
    """`configs/quickstart.yaml` of this repository, as short as a user would type it from here."""
    path = ROOT / CONFIG
    if not path.is_file():
        raise UserError(f"{path} is missing: expected the repository's own {CONFIG}.")
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def installed_text() -> Text:
    """Python's library and the packages of this Python, as the configuration's two sources."""
    directories = ",".join((sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")))
    return Text(
        name="quickstart",
        sources=tuple(f"data.sources.{source}.path=[{directories}]" for source in (0, 1)),
        overrides=(),
        prompts=("def __init__(self", "Permission is hereby granted"),
    )


def own_text(data: Path) -> Text:
    """The user's file as the only source of a store and a run of its own.

    Raises:
        UserError: there is no such file.
    """
    if not data.exists():
        raise UserError(f"there is no file {data}: expected a jsonl, parquet or txt file, also .gz or .zst.")
    place = data.resolve()
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", place.name.split(".")[0]).strip("-") or "text"
    name = f"quickstart-{word}-{hash_bytes(str(place).encode())[:4]}"
    source = json.dumps([{"name": word, "path": str(place)}], ensure_ascii=False)
    return Text(
        name=name,
        sources=(f"data.sources={source}", "data.validation.share=0.05"),
        overrides=(f"run.name={name}", f"data.store=stores/{name}", "data.mixture={}"),
        prompts=(),
    )


def _as_typed(arguments: Sequence[str]) -> str:
    return shlex.join(arguments)


def _run(arguments: Sequence[str]) -> int:
    """The command as a process of its own; Ctrl-C reaches it too, and it is waited for while it saves."""
    process = subprocess.Popen([sys.executable, "-P", "-m", "launcher", *arguments], env=repository_environment())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _ending(console: Console, text: Text, seconds: float) -> None:
    name, run = text.name, find_run(f"runs/{text.name}").path
    console.print(f"\n[bold]Done in {format_duration(seconds)}.[/bold] What is where:")
    for path, meaning in (
        (f"{run}/report.html", "curves, corpus, evaluation and samples: open it in a browser"),
        (f"{run}/checkpoints/", "the model; every layout can load it"),
        (f"{run}/metrics.jsonl", "one line a logged step"),
        (f"{run}/wandb/", "the offline Weights & Biases run: `wandb sync` sends it"),
        (f"stores/{name}/", "the token store and its report"),
    ):
        console.print(f"  {path:<{len(str(run)) + 16}} {meaning}")
    console.print("\nWhat to try next (after `source .venv/bin/activate`):")
    again = shlex.join(override for override in text.overrides if not override.startswith("run.name="))
    train = f"bloomery train {CONFIG} {again}".rstrip()
    for command in (
        f'bloomery generate {name} --prompt "class Model" --temperature 0.8',
        f"{train} run.name={name}-wider model.hidden_size=384 --ranks 2",
        f"{train} run.name={name}-tensor parallel.tensor=2 --ranks 2",
        "make quickstart DATA=your-text.jsonl.gz",
    ):
        console.print(f"  {command}", markup=False)
