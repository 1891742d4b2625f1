"""Runs the commands that the documentation and `--help` show, page after page, as a reader would type them.

    python -m tests.accept_docs                       # what `make docs-test` calls; a quarter of an hour on two cores
    python -m tests.accept_docs --page docs/data.md   # or --help; --list: what would run, and why not the rest

A command is a line of an indented or fenced block, or a paragraph between backticks, that begins with a program of
ours. It runs through bash in a scratch directory of its page, in which the repository's own directories stand as links,
beside the files that a reader has, under the names that the pages give them (tests/documented/reader.py). What a page
prints below a command must be what the command prints. A command that cannot run here is listed with its reason
(`NOT_HERE`); `INSTEAD` says how one runs in small. A row of either that fits no command any more is an error.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.documented import reader
from tests.documented.commands import PAGES, ROOT, Command, commands
from tests.documented.examples import examples

NOT_HERE: dict[str, str] = {
    r"^make (quickstart|test|lint|format|venv|bench|docs-test|test-slurm|soak)\b": "a target of its own",
    r"^(sbatch|srun|torchrun --nnodes)": "needs a cluster",
    r"^bloomery quickstart": "what `make quickstart` calls",
    r"^bloomery (data build|train) configs/quickstart\.yaml (data|run)\.": "README's, with one more key",
    r"--matrix tests/": "hundreds of layouts: minutes, and part of the tests",
    r"^bloomery train .*layout\.yaml": "needs the GPUs that the plan is for",
    r"--format (deepspeed|megatron)": "needs a checkpoint of another program: test_import_foreign.py",
    r"--harness arc_easy": "its data sets are downloaded",
    r"checkpoint\.load=runs/sft": "starts from the import above",
    r"^bloomery data examples chat\.jsonl|data\.store=stores/chat train\.objective": (
        "needs conversations: tests/launcher/test_finetune.py makes some"
    ),
    r"(export|evaluate) runs/sorter": "needs a classifier: tests/launcher/test_finetune.py makes one",
    r"--file prompts\.txt|generate runs/chat": "needs what the line above would have made: test_generate.py",
    r"tutorial|^bloomery (evaluate|generate) (lesson|classes|scratch|chat) ?": "python -m tests.accept_tutorial",
}
"""Commands that are not run: a pattern, and why."""

INSTEAD: dict[str, tuple[str, str]] = {
    r"^bloomery submit (?!.*--dry-run)": (
        r"\g<0>--dry-run ",
        "without a cluster its sbatch line is made, not handed over",
    ),
    r"^bloomery train CONFIG (?=.*(lion|focal))": (
        "bloomery train my-run.yaml plugins=[my_recipes] ",
        "a placeholder, with the key of which the page speaks",
    ),
    r"^bloomery data build CONFIG (?=.*own=)": (
        "bloomery data build my-corpus.yaml plugins=[my_recipes] data.store=stores/own ",
        "likewise",
    ),
    r"^bloomery status my-run": ("bloomery status", "without a cluster nothing was submitted: all runs"),
    r" train\.sequence_length=32768": (r"\g<0> train.global_batch_size=2", "fewer of the longest samples"),
    r"grow my-corpus\.yaml .*=3600": (
        "grow new-sources.yaml data.grow.idle_seconds=1",
        "an hour",
    ),
    r"^bloomery data grow CONFIG\.\.\.": ("bloomery data grow new-sources.yaml", "a placeholder"),
    r" CONFIG\.\.\.| CONFIG": (" my-corpus.yaml", "a placeholder"),
    r" \[key=value \.\.\.\]": ("", "a placeholder"),
    r"^torchrun --nproc-per-node 8 (.*)": (r"torchrun --nproc-per-node 2 \1 run.name=by-torchrun", "fewer cores"),
    r"--nodes 128 ": ("--nodes 8 ", "fewer samples than 1,024 ranks"),
    r"@([1-9])0+\b": (r"@\1", "a shorter run"),
    r"checkpoint prune first": ("checkpoint prune second", "the first is looked at later"),
    r"models/Llama-3\.2-1B": ("models/Qwen3-0.6B", "the one that the reader has"),
    r"corpora/web_text_document": ("$(ls stores/mixed/*.bin | head -n 1 | sed s/.bin$//)", "any Megatron corpus"),
    r"(?<!--output )stores/(web|quick|base)\b": ("stores/mixed", "the one that the reader has"),
    r'--grep "def read\("': ('--grep "iron"', "what the reader's text is about"),
    r" STORE\b": (" stores/mixed", "a placeholder"),
}
"""Commands that run in another form: a pattern, what stands there instead, and why."""

LIMIT_SECONDS = 900


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """What became of a command."""

    command: Command
    seconds: float
    complaint: str
    """Empty where all went well."""


def plan(found: Sequence[Command]) -> Iterator[tuple[Command, str]]:
    """Each command as it will run, and why it will not (or an empty string)."""
    for command in found:
        reason = next((why for pattern, why in NOT_HERE.items() if re.search(pattern, command.text)), "")
        text = command.text
        for pattern, (instead, _) in INSTEAD.items():
            text = re.sub(pattern, instead, text)
        yield replace(command, text=text), reason


def idle_rows(found: Sequence[Command]) -> list[str]:
    """Patterns of the tables that fit no command."""
    return [each for each in (*NOT_HERE, *INSTEAD) if not any(re.search(each, command.text) for command in found)]


def shown() -> list[Command]:
    """All commands of the pages, and of `--help`, which is a page here."""
    return [
        *(command for page in PAGES for command in commands(page)),
        *(replace(command, page="--help") for command in examples()),
    ]


def run(command: Command, directory: Path) -> Ran:
    """Runs one command as a reader would, and compares what it prints with what the page says."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{directory}:{ROOT}",
        "HOME": str(directory / "home"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "COLUMNS": "200",
    }
    started = time.monotonic()
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.text],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ran(command=command, seconds=LIMIT_SECONDS, complaint=f"took more than {LIMIT_SECONDS} s")
    complaint = "" if done.returncode == 0 else f"exit code {done.returncode}\n{done.stdout[-3000:]}"
    printed = {" ".join(line.split()) for line in done.stdout.splitlines()}
    missing = [line for line in command.printed if " ".join(line.split()) not in printed]
    if not complaint and missing:
        complaint = "the page shows what was not printed:\n  " + "\n  ".join(missing) + "\nit printed:\n" + done.stdout
    return Ran(command=command, seconds=time.monotonic() - started, complaint=complaint)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs them all, a line each; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="append", help="this page only (may be repeated)")
    parser.add_argument("--only", default="", help="commands with this in them")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--keep", metavar="DIR", help="work here, and leave it")
    chosen = parser.parse_args(arguments)
    every = shown()
    if idle := idle_rows(every):
        print("rows of the tables that fit no command any more:", *idle, sep="\n  ")
        return 1
    pages = chosen.page or list(dict.fromkeys(each.page for each in every))
    wanted = [each for each in every if each.page in pages and chosen.only in each.text]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for page in pages:
            directory = Path(chosen.keep or scratch).resolve() / page.replace("/", "-")
            failed += _run_page([each for each in wanted if each.page == page], directory, only_list=chosen.list)
    print(f"{failed} commands failed" if failed else "every command did what its page says")
    return int(failed > 0)


def _before(page: str) -> list[str]:
    """What a reader has done before opening the page."""
    names = {"--help": ("first", "second"), "docs/finetuning.md": ("first",)}.get(page, ())
    runs = [f"bloomery train my-run.yaml run.name={name}" for name in names]
    return ["bloomery data build my-corpus.yaml", *runs]


def _run_page(found: Sequence[Command], directory: Path, *, only_list: bool) -> int:
    """The commands of a page, in a directory of their own; how many failed."""
    planned = list(plan(found))
    if not only_list and not all(reason for _, reason in planned):
        reader.make(directory)
        planned = [(Command(page=found[0].page, line=0, text=text), "") for text in _before(found[0].page)] + planned
    failed = 0
    for command, reason in planned:
        where = f"{command.page}:{command.line}"
        if reason or only_list:
            print(f"{where:<24} {'not run: ' + reason if reason else 'would run'}: {command.text}", flush=True)
            continue
        ran = run(command, directory)
        failed += bool(ran.complaint)
        verdict = "WRONG" if ran.complaint else "ok"
        print(f"{where:<24} {verdict:<5} {ran.seconds:4.0f} s  {command.text}", flush=True)
        if ran.complaint:
            print("    " + ran.complaint.replace("\n", "\n    "), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
