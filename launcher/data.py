"""`bloomery data`: from raw text to a token store.

bloomery data build CONFIG... [key=value ...] [--overwrite]
bloomery data check STORE
"""

import argparse
from pathlib import Path

from data_pipeline.build import build
from data_pipeline.store import Store
from launcher.config import load, require
from launcher.report.store_page import write_store_page
from launcher.verbs.train import split


def main(arguments: list[str]) -> int:
    """Runs one word of `bloomery data` and returns the exit code."""
    parser = argparse.ArgumentParser(prog="bloomery data", description="From raw text to a token store.")
    words = parser.add_subparsers(dest="word", required=True, metavar="build|check")
    word = words.add_parser("build", help="read, clean, deduplicate, split, tokenise; goes on where it stopped")
    word.add_argument("config", nargs="+", metavar="CONFIG|key=value", help="YAML files, then overrides")
    word.add_argument("--overwrite", action="store_true", help="replace a store that was built differently")
    word = words.add_parser("check", help="read every file of a store and compare it with its hash")
    word.add_argument("store", metavar="STORE", type=Path)
    given = parser.parse_args(arguments)
    return _check(given.store) if given.word == "check" else _build(given.config, overwrite=given.overwrite)


def _build(given: list[str], *, overwrite: bool) -> int:
    config = load(*split(given))
    require(config, "data")
    build(config.data, overwrite=overwrite)
    write_store_page(Path(config.data.store))
    return 0


def _check(path: Path) -> int:
    store = Store.open(path)
    store.check()
    print(f"{path} is whole: {len(store.shards()):,} shards, {sum(s.tokens for s in store.shards()):,} tokens")
    return 0
