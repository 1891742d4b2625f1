"""Training a tokenizer and encoding with it, files in, store out.

    python benchmarks/tokenize.py [--megabytes 40] [--vocabulary-size 32768] [--json FILE]

The corpus is that of benchmarks/dedup.py. `bloomery data train-tokenizer` looks at a quarter of it; `bloomery data
tokenize` reads, splits, encodes and seals all of it, and is measured beside `tokenizers` alone, on texts that are in
memory already. Counted are user and system seconds of all threads; of the commands with their imports.

Bar: within 1.5 times of encoding alone.
"""

import argparse
import json
import resource
import sys
import tempfile
from itertools import batched
from pathlib import Path

from measure import bloomery, measured
from texts import records, write_corpus
from tokenizers import Tokenizer

MOST = 1.5
_BATCH = 1000


def encode_alone(corpus: Path, tokenizer: Path) -> dict[str, float]:
    """Processor seconds for the ids of all texts, and how many there are."""
    encoder = Tokenizer.from_file(str(tokenizer))
    texts = [text for _, _, text in records(corpus)]
    before = resource.getrusage(resource.RUSAGE_SELF)
    tokens = 0
    for batch in batched(texts, _BATCH):
        tokens += sum(len(found.ids) for found in encoder.encode_batch_fast(list(batch), add_special_tokens=False))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, "tokens": tokens}


def main() -> None:
    """Prints the table; exit code 1 where the bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=40, help="text in the corpus")
    parser.add_argument("--vocabulary-size", type=int, default=32768)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--alone", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(encode_alone(*options.alone)))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        corpus, tokenizer, store = (directory / part for part in ("corpus", "tokenizer.json", "store"))
        size = write_corpus(corpus, options.megabytes * 1_000_000)["text_bytes"]
        sizes = ("--vocabulary-size", options.vocabulary_size, "--sample-bytes", size // 4)
        rows = {
            "train-tokenizer": measured(bloomery("data", "train-tokenizer", corpus, "--output", tokenizer, *sizes))[0],
            "tokenize": measured(bloomery("data", "tokenize", corpus, "--tokenizer", tokenizer, "--output", store))[0],
        }
        facts, said = measured([sys.executable, __file__, "--alone", str(corpus), str(tokenizer)])
        rows["encoding alone"] = {**facts, **json.loads(said)}
    print(f"{size / 1e6:.1f} MB of text, {rows['encoding alone']['tokens']:,} tokens\n{'':16}MB/CPU s  CPU s  peak MiB")
    for part, row in rows.items():
        share = size // 4 if part == "train-tokenizer" else size
        row["mb_per_cpu_second"] = share / row["cpu_seconds"] / 1e6
        print(f"{part:16}{row['mb_per_cpu_second']:8.2f}{row['cpu_seconds']:7.1f}{row['peak_bytes'] / 2**20:10,.0f}")
    ratio = rows["tokenize"]["cpu_seconds"] / rows["encoding alone"]["cpu_seconds"]
    print(f"the whole path costs {ratio:.2f} times encoding alone (bar {MOST})")
    if options.json:
        options.json.write_text(json.dumps({"text_bytes": size, "ratio": ratio, "rows": rows}, indent=1) + "\n")
    sys.exit(int(ratio > MOST))


if __name__ == "__main__":
    main()
