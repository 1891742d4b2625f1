"""What the peers do with a corpus of jsonl: each reads it and writes the records that it keeps.

    python benchmarks/peers.py PEER CORPUS OUTPUT

All get the same tokens, 5-grams and 20 bands of 6 rows, and compare nothing: what shares a band is removed.
"""

import importlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from texts import UNSPACED, records, tokens_of

NGRAM, BANDS, ROWS = 5, 20, 6
_BATCH = 1000


def shingles_of(text: str) -> list[str]:
    """What the peers hash."""
    tokens = tokens_of(text)
    return [" ".join(tokens[start : start + NGRAM]) for start in range(max(1, len(tokens) - NGRAM + 1))]


def rensa(corpus: Path, output: Path) -> None:
    """MinHash in Rust; keeps the first of those that resemble each other by signature."""
    library = importlib.import_module("rensa")
    seen = library.RMinHashDeduplicator(threshold=0.8, num_perm=BANDS * ROWS, use_lsh=True, num_bands=BANDS, seed=1)

    def kept() -> Iterator[bytes]:
        for batch in batched(records(corpus), _BATCH):
            sets = [shingles_of(text) for _, _, text in batch]
            signatures = library.RMinHash.from_token_sets(sets, num_perm=BANDS * ROWS, seed=1)
            added = seen.add_pairs([(name, found) for (_, name, _), found in zip(batch, signatures, strict=True)])
            yield from (line for (line, _, _), new in zip(batch, added, strict=True) if new)

    _write(kept(), output)


def datasketch(corpus: Path, output: Path) -> None:
    """MinHash in numpy, with xxhash; keeps the first of those that share a band."""
    library = importlib.import_module("datasketch")
    seen = library.MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))

    def kept() -> Iterator[bytes]:
        for line, name, text in records(corpus):
            signature = library.MinHash(num_perm=BANDS * ROWS, hashfunc=xxhash.xxh32_intdigest)
            signature.update_batch([shingle.encode() for shingle in shingles_of(text)])
            if not seen.query(signature):
                seen.insert(name, signature)
                yield line

    _write(kept(), output)


class _Tokens:
    """The same tokens for datatrove in place of spaCy's, which it would ask for and which are slower."""

    def word_tokenize(self, text: str) -> list[str]:
        return tokens_of(text)


def datatrove(corpus: Path, output: Path) -> None:
    """Its four steps, in one process."""
    dedup: Any = importlib.import_module("datatrove.pipeline.dedup.minhash")
    readers: Any = importlib.import_module("datatrove.pipeline.readers")
    writers: Any = importlib.import_module("datatrove.pipeline.writers.jsonl")
    executor: Any = importlib.import_module("datatrove.executor.local").LocalPipelineExecutor
    importlib.import_module("loguru").logger.remove()
    work = output / "work"
    config = dedup.MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    signature = dedup.MinhashDedupSignature(str(work / "signatures"), config=config, language="ace_Arab")
    signature.word_tokenizer = _Tokens()
    signature._hash_func = lambda shingle: xxhash.xxh64_intdigest(shingle.encode())  # xxhash 4 asks for bytes
    steps = (
        ([readers.JsonlReader(str(corpus)), signature], 1),
        ([dedup.MinhashDedupBuckets(str(work / "signatures"), str(work / "buckets"), config=config)], BANDS),
        ([dedup.MinhashDedupCluster(str(work / "buckets"), str(work / "removed"), config=config)], 1),
        (
            [
                readers.JsonlReader(str(corpus)),
                dedup.MinhashDedupFilter(str(work / "removed")),
                writers.JsonlWriter(str(output), compression=None),
            ],
            1,
        ),
    )
    for number, (step, tasks) in enumerate(steps):
        executor(pipeline=step, tasks=tasks, workers=1, logging_dir=str(work / f"logs-{number}")).run()
    shutil.rmtree(work)


def daft(corpus: Path, output: Path) -> None:
    """Its own expressions, on all cores; keeps the first of those that share a band (chains are cut short)."""
    library = importlib.import_module("daft")
    functions = importlib.import_module("daft.functions")
    column = library.col
    table = library.read_json(f"{corpus}/*.jsonl").into_batches(_BATCH)
    # Daft's shingles are of words between spaces: everything else becomes one.
    words = functions.regexp_replace(column("text").lower(), f"([{UNSPACED}])", " $1 ")
    words = functions.regexp_replace(words, r"\W+", " ")
    hashes = functions.minhash(
        words, num_hashes=BANDS * ROWS, ngram_size=NGRAM, seed=1, hash_function="xxhash3_64"
    ).alias("hashes")
    found = table.select(column("id"), hashes).to_arrow()
    signatures = np.stack(found.column("hashes").to_numpy()).astype(np.uint32).reshape(-1, BANDS, ROWS)
    seen: set[tuple[int, bytes]] = set()
    removed: set[str] = set()
    for identifier, signature in zip(found.column("id").to_pylist(), signatures, strict=True):
        bands = {(number, band.tobytes()) for number, band in enumerate(signature)}
        if bands & seen:
            removed.add(identifier)
        else:
            seen |= bands
    _write((line for line, identifier, _ in records(corpus) if identifier not in removed), output)


def _write(lines: Iterable[bytes], output: Path) -> None:
    with (output / "kept.jsonl").open("wb") as file:
        file.writelines(lines)


PEERS: dict[str, Callable[[Path, Path], None]] = {
    "rensa": rensa,
    "datasketch": datasketch,
    "datatrove": datatrove,
    "daft": daft,
}

if __name__ == "__main__":
    PEERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
