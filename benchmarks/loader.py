"""Speed, start and state of the loader, in one process.

    python -m benchmarks.loader [--tokens 100000000] [--json FILE]

Writes a store of random ids with document lengths like those of web text (log-normal, median 400 tokens; a second
source of short ones, median 60) to a temporary directory, opens it in a fresh process for each row, and reads batches
over random places of the whole store. The file cache is warm; imports are not counted.

Bars: 50 M tokens/s, first batch in less than a second, state below 4 KiB. On a machine that others use, look at the
tokens of a processor second.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.loader import Loader
from data_pipeline.store import TRAINING, Store, StoreWriter, TokenizedDocument
from data_pipeline.tokenizer import train
from parallel.common.files import write_json
from parallel.common.units import format_count

SHARD_TOKENS = 25_000_000
SHAPES = ((512, 16), (2048, 16), (2048, 64), (4096, 256))
"""(sequence length, global batch size) of each row."""
MEDIAN_TOKENS = {"web": 400, "short": 60}


def _documents(name: str, tokens: int, vocabulary_size: int) -> Iterator[TokenizedDocument]:
    generator = np.random.default_rng(len(name))
    made = 0
    while made < tokens:
        lengths = np.maximum(generator.lognormal(np.log(MEDIAN_TOKENS[name]), 1.0, 1000).astype(int), 1)
        ids = generator.integers(66, vocabulary_size, lengths.sum())
        for part in np.split(ids, np.cumsum(lengths)[:-1]):
            yield TokenizedDocument(id=f"{name}-{made}", tokens=part.tolist(), text_bytes=4 * len(part))
            made += len(part) + 1


def make_store(path: Path, tokens: int) -> None:
    """A store of about `tokens` random ids, four fifths of them from long documents."""
    path.mkdir(parents=True)
    tokenizer = train(iter(["a word and another"]), 384, path / "tokenizer.json")
    writer = StoreWriter(path, tokenizer=tokenizer, configuration="benchmark")
    for name, share in (("web", 0.8), ("short", 0.2)):
        documents = _documents(name, int(share * tokens), tokenizer.vocabulary_size)
        while writer.add_shard(name, TRAINING, documents, max_tokens=SHARD_TOKENS):
            pass
    writer.finish()


def measure(path: Path, sequence_length: int, global_batch_size: int, seconds: float) -> dict[str, float]:
    """One row of the table: first batch from nothing, then batches for some seconds."""
    start = time.perf_counter()
    loader = Loader(
        Store.open(path),
        mixture={"web": 0.8, "short": 0.2},
        sequence_length=sequence_length,
        global_batch_size=global_batch_size,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        seed=1,
    )
    loader.next_batch()
    first_batch_seconds = time.perf_counter() - start
    for _ in range(3):
        loader.next_batch()
    batches = 0
    start, used = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        loader.next_batch()
        batches += 1
    return {
        "sequence_length": sequence_length,
        "global_batch_size": global_batch_size,
        "first_batch_seconds": first_batch_seconds,
        "tokens_per_second": batches * global_batch_size * sequence_length / elapsed,
        "tokens_per_cpu_second": batches * global_batch_size * sequence_length / (time.process_time() - used),
        "state_bytes": len(json.dumps(loader.state_dict())),
    }


def main() -> None:
    """Measures every shape in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens in the store")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each row")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        path, length, batch = options.row
        print(json.dumps(measure(Path(path), int(length), int(batch), options.seconds)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        make_store(store, options.tokens)
        print("sequence   batch   first batch   tokens/s  tokens/CPU s   state")
        for length, batch in SHAPES:
            command = [sys.executable, "-m", "benchmarks.loader", "--seconds", str(options.seconds)]
            row = subprocess.run(
                [*command, "--row", str(store), str(length), str(batch)], check=True, capture_output=True, text=True
            )
            figures = json.loads(row.stdout.splitlines()[-1])
            rows.append(figures)
            rate, per_cpu = (format_count(figures[f"tokens_per_{unit}second"]) for unit in ("", "cpu_"))
            first = figures["first_batch_seconds"]
            print(f"{length:8d} {batch:7d} {first:11.2f} s {rate:>10} {per_cpu:>13} {figures['state_bytes']:5d} B")
    if options.json:
        write_json(options.json, {"store_tokens": options.tokens, "rows": rows})


if __name__ == "__main__":
    main()
