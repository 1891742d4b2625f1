"""Looking at a token store: stats, inspect, check, report."""

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.inspect import BUCKETS, Found, by_id, containing, pieces, sample, statistics
from data_pipeline.store import Store
from launcher.report.store_page import write_store_page
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.units import format_bytes, format_count

_BAR = 40
_SHOWN_CHARACTERS = 2000
_SHOWN_TOKENS = 200
_GREP_SHOWN = 10


def stats(options: argparse.Namespace) -> int:
    """`data stats STORE [--json FILE]`."""
    found = statistics(Store.open(options.store))
    if options.json is not None:
        write_json(options.json, found)
    for line in _tables(found):
        print(line)
    return 0


def _tables(found: dict[str, Any]) -> Iterator[str]:
    heads = ("source", "split", "documents", "tokens", "text", "bytes/token", "median", "longest")
    yield f"{heads[0]:<20} {heads[1]:<10} " + " ".join(f"{head:>11}" for head in heads[2:])
    histogram = [0] * (len(BUCKETS) + 1)
    for source, splits in found["sources"].items():
        for split, facts in splits.items():
            yield (
                f"{source:<20} {split:<10} {facts['documents']:>11,} {format_count(facts['tokens']):>11} "
                f"{format_bytes(facts['text_bytes']):>11} {facts['text_bytes'] / facts['tokens']:>11.2f} "
                f"{facts['median']:>11,.0f} {facts['longest']:>11,}"
            )
            histogram = [a + b for a, b in zip(histogram, facts["histogram"], strict=True)]
    yield ""
    yield "tokens in a document"
    most = max(histogram)
    for border, count in zip([*map(str, BUCKETS), "more"], histogram, strict=True):
        label = border if border == "more" else f"to {int(border):,}"
        yield f"{label:>12} {count:>11,} {'#' * -(-count * _BAR // most)}"


def inspect(options: argparse.Namespace) -> int:
    """`data inspect STORE --sample N | --grep TEXT | --document ID`."""
    store = Store.open(options.store)
    if options.document is not None:
        found = list(by_id(store, options.document))
        if not found:
            raise UserError(
                f"{options.store} has no document with the id {options.document!r}: it was dropped (STORE/report.html "
                f"and clusters.parquet tell why), or never came in"
            )
    elif options.grep is not None:
        found = list(islice(containing(store, options.grep), _GREP_SHOWN + 1))
        if not found:
            raise UserError(f"no document of {options.store} contains {options.grep!r}")
    else:
        found = list(sample(store, options.sample, options.seed))
    _show(store, found[:_GREP_SHOWN] if options.grep is not None else found)
    if options.grep is not None and len(found) > _GREP_SHOWN:
        print(f"... and more: these are the first {_GREP_SHOWN}")
    return 0


def _show(store: Store, documents: Iterable[Found]) -> None:
    for found in documents:
        print(
            f"== {found.id}   {found.source}, {found.split}, {found.shard} from token {found.offset:,}; "
            f"{format_bytes(found.text_bytes)}, {len(found.tokens):,} tokens"
        )
        cut = len(found.text) > _SHOWN_CHARACTERS
        print(found.text[:_SHOWN_CHARACTERS] + (" [...]" if cut else ""))
        shown = pieces(store, found)[:_SHOWN_TOKENS]
        print(
            "-- " + "|".join(repr(piece)[1:-1] for piece in shown) + ("|..." if len(found.tokens) > len(shown) else "")
        )


def check(options: argparse.Namespace) -> int:
    """`data check STORE`."""
    store = Store.open(options.store)
    store.check()
    print(f"{options.store} is whole: {len(store.shards()):,} shards, {sum(s.tokens for s in store.shards()):,} tokens")
    return 0


def report(options: argparse.Namespace) -> int:
    """`data report STORE`."""
    Store.open(options.store)
    print(write_store_page(options.store))
    return 0


def add_words(words: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parsers of these words."""
    raw = argparse.RawDescriptionHelpFormatter
    word = words.add_parser(
        "stats",
        formatter_class=raw,
        help="tokens, documents and lengths of a store, by source",
        description="Tokens, documents, bytes a token and a histogram of lengths, by source and split.",
        epilog="example: bloomery data stats stores/web --json stats.json",
    )
    word.add_argument("store", metavar="STORE", type=Path)
    word.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    word.set_defaults(run=stats)
    word = words.add_parser(
        "inspect",
        formatter_class=raw,
        help="documents of a store: text, origin, tokens",
        description="Shows documents as training sees them: where they came from, their text, and how it is cut into\n"
        "tokens (between bars).",
        epilog="examples: bloomery data inspect stores/web --sample 3\n"
        '          bloomery data inspect stores/web --grep "def read("\n'
        "          bloomery data inspect stores/web --document web/a.jsonl:17",
    )
    word.add_argument("store", metavar="STORE", type=Path)
    which = word.add_mutually_exclusive_group(required=True)
    which.add_argument("--sample", type=int, metavar="N", help="N documents by chance")
    which.add_argument("--grep", metavar="TEXT", help=f"the first {_GREP_SHOWN} documents that contain a text")
    which.add_argument("--document", metavar="ID", help="the document with this id")
    word.add_argument("--seed", type=int, default=0, help="another sample (0)")
    word.set_defaults(run=inspect)
    word = words.add_parser(
        "check",
        help="read every file of a store and compare it with its hash",
        description="Reads every file of a store and compares it with the hash that its manifest has of it.",
        epilog="example: bloomery data check stores/web",
    )
    word.add_argument("store", metavar="STORE", type=Path)
    word.set_defaults(run=check)
    word = words.add_parser(
        "report",
        formatter_class=raw,
        help="one HTML page: what came in, what was dropped and why",
        description="Writes STORE/report.html: what each stage kept and dropped, with samples, duplicates by source,\n"
        "token lengths, languages. One file that needs no network.",
        epilog="example: bloomery data report stores/web",
    )
    word.add_argument("store", metavar="STORE", type=Path)
    word.set_defaults(run=report)
