"""`bloomery data examples`: labelled examples and conversations to a store that training fine-tunes on."""

import argparse
import json
from pathlib import Path

from data_pipeline.examples.build import build_examples
from data_pipeline.examples.kinds import Facts
from data_pipeline.store import TRAINING, VALIDATION
from data_pipeline.tokenizer import Tokenizer
from launcher.verbs.data_alone import names_of
from parallel.common.errors import UserError

_DESCRIPTION = """\
Makes a store of examples, one a line of JSON, which is all of one kind:

  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
  {"prompt": ..., "completion": ...}      train.objective=answers, or seq2seq for a t5
  {"text": ..., "label": ...}             model.classes.number=N
  {"words": [...], "labels": [...]}       model.classes={number: N, of: tokens}

What the assistant says, the completion or the class is learnt; all else is only read."""


def examples(options: argparse.Namespace) -> int:
    """`data examples INPUT... --tokenizer PATH --output STORE`."""
    if options.output.exists():
        raise UserError(f"--output {options.output} exists: give another name, or remove it")
    template = options.chat_template
    if template is not None and not template.is_file():
        raise UserError(f"--chat-template: there is no file {template}")
    names = names_of([*options.input, *options.validation])
    files = dict(zip(names, map(Path, [*options.input, *options.validation]), strict=True))
    held_out = {name: files.pop(name) for name in names[len(options.input) :]}
    beside = Facts.read(_directory(options.tokenizer))
    store, facts, refused = build_examples(
        files,
        options.output,
        tokenizer=Tokenizer.load(options.tokenizer),
        chat_template=_template_of(options.tokenizer) if template is None else template.read_text(encoding="utf-8"),
        validation_share=options.validation_share,
        held_out=held_out,
        labels=() if beside is None else beside.labels,
    )
    for reason, count in refused.most_common():
        print(f"left out: {count:,} x {reason}")
    for split in (TRAINING, VALIDATION):
        shards = store.shards(split=split)
        documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
        print(f"{split}: {documents:,} examples of {facts.kind.value}, {tokens:,} tokens")
    if facts.labels:
        print(f"{len(facts.labels)} classes: {', '.join(facts.labels)}")
    return 0


def _directory(tokenizer: Path) -> Path:
    return tokenizer if tokenizer.is_dir() else tokenizer.parent


def _template_of(tokenizer: Path) -> str | None:
    """The chat template that stands beside a model's tokenizer."""
    directory = _directory(tokenizer)
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    config = directory / "tokenizer_config.json"
    found = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None


def add_word(words: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Its parser."""
    word = words.add_parser(
        "examples",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="conversations or labelled examples as a store to fine-tune on",
        description=_DESCRIPTION,
        epilog="example: bloomery data examples chat.jsonl --tokenizer stores/base --output stores/chat",
    )
    word.add_argument("input", nargs="+", metavar="INPUT", help="jsonl files, also .gz or .zst; a source each")
    word.add_argument(
        "--tokenizer", type=Path, required=True, metavar="PATH",
        help="the model's: a tokenizer.json, or the directory that it is in (a store, an imported run)",
    )  # fmt: skip
    word.add_argument("--output", type=Path, required=True, metavar="STORE", help="directory of the store")
    word.add_argument(
        "--chat-template", type=Path, metavar="FILE",
        help="jinja; default: what stands beside the tokenizer, else turns between two reserved tokens",
    )  # fmt: skip
    word.add_argument("--validation-share", type=float, default=0.0, help="share of examples held out (0)")
    word.add_argument("--validation", nargs="+", default=[], metavar="INPUT", help="files that are held out whole")
    word.set_defaults(run=examples)
