"""`bloomery data`: from raw text to a token store, whole or one stage at a time.

bloomery data build CONFIG... [key=value ...] [--overwrite]
bloomery data grow CONFIG... [key=value ...]
bloomery data dedup | decontaminate | train-tokenizer | tokenize | examples INPUT... --output PLACE
bloomery data stats | inspect | check | report STORE
"""

import argparse
from pathlib import Path

from data_pipeline.build import build
from data_pipeline.growth.job import grow
from launcher.config import load, require
from launcher.report.store_page import write_store_page
from launcher.verbs import data_alone, data_examples, data_look
from launcher.verbs.train import split

_EPILOG = """\
examples:
  bloomery data build configs/quickstart.yaml data.store=stores/quick
  bloomery data dedup web/*.jsonl --output web-clean
  bloomery data stats stores/quick

`bloomery data WORD --help` says more."""


def main(arguments: list[str]) -> int:
    """Runs one word of `bloomery data` and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="bloomery data",
        description="From raw text to a token store, whole or one stage at a time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    word = words.add_parser(
        "build",
        help="read, clean, filter, deduplicate, split, tokenise; goes on where it stopped",
        description="Makes the store that a configuration describes. The same command goes on where it stopped.",
        epilog="example: bloomery data build configs/quickstart.yaml data.stages.near_dedup.threshold=0.7",
    )
    word.add_argument("config", nargs="+", metavar="CONFIG|key=value", help="YAML files, then overrides")
    word.add_argument("--overwrite", action="store_true", help="replace a store that was built differently")
    word.set_defaults(run=_build)
    word = words.add_parser(
        "grow",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="a store that grows by sealed shards, which training may follow; adds to a finished one",
        description="Works through the sources in portions and seals each as shards, while `bloomery train` with\n"
        "data.follow=true may already read them. What resembles anything seen before is dropped. Behind a\n"
        "store that `data build` finished it adds new sources, without reading the old text again.\n"
        "The same command goes on where it stopped.",
        epilog="example: bloomery data grow my-corpus.yaml data.grow.idle_seconds=3600",
    )
    word.add_argument("config", nargs="+", metavar="CONFIG|key=value", help="YAML files, then overrides")
    word.set_defaults(run=_grow)
    data_alone.add_words(words)
    data_examples.add_word(words)
    data_look.add_words(words)
    options = parser.parse_args(arguments)
    return options.run(options)


def _grow(options: argparse.Namespace) -> int:
    config = load(*split(options.config))
    require(config, "data")
    grow(config.data)
    write_store_page(Path(config.data.store))
    return 0


def _build(options: argparse.Namespace) -> int:
    config = load(*split(options.config))
    require(config, "data")
    build(config.data, overwrite=options.overwrite)
    write_store_page(Path(config.data.store))
    return 0
