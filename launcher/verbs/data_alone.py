"""The stages of `bloomery data build`, each alone: dedup, decontaminate, train-tokenizer, tokenize."""

import argparse
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.build import build, train_tokenizer
from data_pipeline.config import (
    CleanConfig,
    DataConfig,
    DecontaminateConfig,
    NearDedupConfig,
    SourceConfig,
    StagesConfig,
    TokenizerConfig,
    ValidationConfig,
)
from data_pipeline.foreign import import_megatron
from data_pipeline.select import select
from data_pipeline.tokenizer import Tokenizer
from launcher.report.store_page import write_store_page
from parallel.common.errors import UserError

_NO_DEDUP = StagesConfig(
    clean=CleanConfig(min_characters=1), exact_dedup=False, near_dedup=NearDedupConfig(enabled=False)
)
_INPUT = "a file, a directory or a glob of jsonl or parquet; each is a source, the first has priority"


def add_inputs(parser: argparse.ArgumentParser, what: str = _INPUT) -> None:
    """The arguments that all of these words have."""
    parser.add_argument("input", nargs="+", metavar="INPUT", help=what)
    parser.add_argument("--text-field", default="text", help="field that holds the text (default: text)")
    parser.add_argument("--id-field", default="id", help="field that holds the id (default: id; else made from place)")


def names_of(inputs: Sequence[str]) -> list[str]:
    """A name of its own for each input, after its file."""
    names: list[str] = []
    for given in inputs:
        stem = re.sub(r"[^\w.-]+", "-", Path(given).name.split(".")[0] or "input").strip("-") or "input"
        names.append(stem if stem not in names else f"{stem}-{len(names) + 1}")
    return names


def sources_of(options: argparse.Namespace) -> list[SourceConfig]:
    """One source for each input, named after it."""
    return [
        SourceConfig(name=name, path=given, text_field=options.text_field, id_field=options.id_field)
        for name, given in zip(names_of(options.input), options.input, strict=True)
    ]


def dedup(options: argparse.Namespace) -> int:
    """`data dedup INPUT... --output DIR`."""
    near = NearDedupConfig(enabled=not options.exact_only, threshold=options.threshold)
    stages = StagesConfig(near_dedup=near, max_dropped_share=1.0)
    report = select(sources_of(options), options.output, stages)
    _say_kept(options.output, report["stages"], ("exact", "near"))
    return 0


def decontaminate(options: argparse.Namespace) -> int:
    """`data decontaminate INPUT... --against FILE... --output DIR`."""
    settings = DecontaminateConfig(files=tuple(options.against), ngram=options.ngram)
    stages = replace(_NO_DEDUP, decontaminate=settings, max_dropped_share=1.0)
    report = select(sources_of(options), options.output, stages)
    _say_kept(options.output, report["stages"], ("decontaminate",))
    return 0


def _say_kept(output: Path, stages: dict, names: Iterable[str]) -> None:
    last = [name for name in names if name in stages][-1]
    kept = sum(entry["kept"]["documents"] for entry in stages[last]["counts"]["sources"].values())
    print(f"{output}: {kept:,} documents, clusters.parquet, report.json")


def tokenizer(options: argparse.Namespace) -> int:
    """`data train-tokenizer INPUT... --output FILE`: the stages' files lie beside the output while it works."""
    work = options.output.with_name(f".{options.output.name}.work")
    if options.output.exists():
        raise UserError(f"--output {options.output} exists: give another name, or remove it")
    config = DataConfig(
        sources=sources_of(options),
        store=str(work),
        stages=_NO_DEDUP,
        tokenizer=TokenizerConfig(vocabulary_size=options.vocabulary_size, sample_bytes=options.sample_bytes),
        validation=ValidationConfig(share=0),
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(config).rename(options.output)
    shutil.rmtree(work)
    print(f"{options.output}: byte-level BPE of {options.vocabulary_size:,} tokens")
    return 0


def tokenize(options: argparse.Namespace) -> int:
    """`data tokenize INPUT... --tokenizer PATH --output STORE`: a store of everything that comes in."""
    build(
        DataConfig(
            sources=sources_of(options),
            store=str(options.output),
            stages=_NO_DEDUP,
            tokenizer=TokenizerConfig(path=str(options.tokenizer)),
            validation=ValidationConfig(share=options.validation_share),
        )
    )
    write_store_page(options.output)
    return 0


def import_corpus(options: argparse.Namespace) -> int:
    """`data import PREFIX... --tokenizer PATH --output STORE`: Megatron's files as a store."""
    prefixes: dict[str, Path] = {}
    for given in options.prefix:
        prefix = given.with_suffix("") if given.suffix in (".bin", ".idx") else given
        if prefix.name in prefixes and prefixes[prefix.name] != prefix:
            raise UserError(f"{prefix} and {prefixes[prefix.name]} have one name, and would be one source: rename one")
        prefixes[prefix.name] = prefix
    import_megatron(
        prefixes,
        options.output,
        tokenizer=Tokenizer.load(options.tokenizer),
        validation_share=options.validation_share,
        shard_tokens=DataConfig().shard_tokens,
    )
    return 0


def add_words(words: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The parsers of these words."""
    raw = argparse.RawDescriptionHelpFormatter
    word = words.add_parser(
        "dedup",
        formatter_class=raw,
        help="drop exact and near duplicates of jsonl or parquet files",
        description="Drops exact copies and near-duplicates (MinHash bands, then exact Jaccard of token 5-grams): no\n"
        "two kept documents resemble each other, and each dropped one has a kept twin. Kept records come\n"
        "out as they were, beside clusters.parquet (who stands for whom, how alike) and report.json.",
        epilog="example: bloomery data dedup new.jsonl.gz old/ --output clean --threshold 0.8",
    )
    add_inputs(word)
    word.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new directory")
    word.add_argument("--threshold", type=float, default=0.8, help="Jaccard similarity of a near-duplicate (0.8)")
    word.add_argument("--exact-only", action="store_true", help="drop only documents with the very same text")
    word.set_defaults(run=dedup)
    word = words.add_parser(
        "decontaminate",
        formatter_class=raw,
        help="drop documents that hold a stretch of an evaluation file",
        description="Drops every document that shares a run of 13 tokens with an evaluation file. Kept records\n"
        "come out as they were, beside hits.parquet (which item of which file was met) and report.json.",
        epilog="example: bloomery data decontaminate web/ --against mmlu.jsonl gsm8k.jsonl --output unseen",
    )
    add_inputs(word)
    word.add_argument("--against", nargs="+", required=True, metavar="FILE", help="jsonl (every text) or txt (lines)")
    word.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new directory")
    word.add_argument("--ngram", type=int, default=13, help="tokens in a row that may not be shared (13)")
    word.set_defaults(run=decontaminate)
    _add_words_of_tokens(words)


def _add_words_of_tokens(words: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    raw = argparse.RawDescriptionHelpFormatter
    anything = "jsonl, parquet or txt files, directories or globs"
    word = words.add_parser(
        "train-tokenizer",
        formatter_class=raw,
        help="train a byte-level BPE tokenizer on a sample",
        description="Trains a tokenizer.json on a bounded sample, taken from each INPUT in proportion to its size.",
        epilog="example: bloomery data train-tokenizer web/ old/ --vocabulary-size 32768 --output tokenizer.json",
    )
    add_inputs(word, anything)
    word.add_argument("--output", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    word.add_argument("--vocabulary-size", type=int, default=32768, help="a multiple of 128 (32768)")
    word.add_argument("--sample-bytes", type=int, default=100_000_000, help="text to look at (100000000)")
    word.set_defaults(run=tokenizer)
    word = words.add_parser(
        "tokenize",
        formatter_class=raw,
        help="turn text into a token store as it is, without deduplication",
        description="Makes a token store of everything that comes in. `data build` also cleans and deduplicates.",
        epilog="example: bloomery data tokenize clean/ --tokenizer tokenizer.json --output stores/clean",
    )
    add_inputs(word, anything)
    word.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="a tokenizer.json")
    word.add_argument("--output", type=Path, required=True, metavar="STORE", help="directory of the store")
    word.add_argument("--validation-share", type=float, default=0.0, help="share of documents held out (0)")
    word.set_defaults(run=tokenize)
    word = words.add_parser(
        "import",
        formatter_class=raw,
        help="an existing Megatron corpus (.bin and .idx) as a token store",
        description="Makes a token store of Megatron corpora as they are: ids, order and borders stay.",
        epilog="example: bloomery data import corpora/web_text_document --tokenizer tokenizer.json --output stores/web",
    )
    word.add_argument(
        "prefix", nargs="+", metavar="PREFIX", type=Path, help="path without .bin and .idx; a source each"
    )
    word.add_argument("--tokenizer", type=Path, required=True, metavar="FILE", help="the one that made the ids")
    word.add_argument("--output", type=Path, required=True, metavar="STORE", help="directory of the store")
    word.add_argument("--validation-share", type=float, default=0.0, help="share of sequences held out (0)")
    word.set_defaults(run=import_corpus)
