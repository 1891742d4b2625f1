"""Looking into a store: how many tokens of what, and single documents with their origin and their tokens.

Nothing here reads more than it must: statistics come from the manifest and the document tables, a document from the
stretch of its shard, and only a search through texts decodes the store, shard by shard.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.mixture import random_bits
from data_pipeline.store import Shard, Store
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import UserError

BUCKETS = tuple(2**power for power in range(4, 18))
"""Upper borders of the length histogram, tokens; the last bucket has none."""
_DECODED = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A document of a store."""

    id: str
    source: str
    split: str
    shard: str
    offset: int
    """Its first token in the shard."""
    text_bytes: int
    text: str
    tokens: list[int]
    """Its end included."""


def statistics(store: Store) -> dict[str, Any]:
    """Tokens, documents, bytes and a histogram of lengths, by source and split, as JSON."""
    found: dict[str, Any] = {"vocabulary_size": store.vocabulary_size, "buckets": list(BUCKETS), "sources": {}}
    for source in store.sources:
        splits: dict[str, Any] = {}
        for split in ("training", "validation"):
            shards = store.shards(split=split, source=source)
            if not shards:
                continue
            lengths = np.concatenate([np.diff(store.document_offsets(shard)) for shard in shards])
            splits[split] = {
                "shards": len(shards),
                "documents": len(lengths),
                "tokens": int(lengths.sum()),
                "text_bytes": sum(shard.text_bytes for shard in shards),
                "shortest": int(lengths.min()),
                "median": float(np.median(lengths)),
                "longest": int(lengths.max()),
                "histogram": np.bincount(np.searchsorted(BUCKETS, lengths), minlength=len(BUCKETS) + 1).tolist(),
            }
        found["sources"][source] = splits
    return found


def sample(store: Store, count: int, seed: int) -> Iterator[Found]:
    """Some documents of the whole store, each as likely as any other; the same ones for the same seed."""
    shards = store.shards()
    ends = np.cumsum([shard.documents for shard in shards])
    words = random_bits(count, "inspect", seed) % np.uint64(ends[-1])
    for place in np.unique(words.astype(np.int64)).tolist():
        number = int(np.searchsorted(ends, place, side="right"))
        yield _document(store, shards[number], place - int(ends[number]) + shards[number].documents, _tokenizer(store))


def by_id(store: Store, identifier: str) -> Iterator[Found]:
    """The documents of that id: one, or one of each source that has it."""
    tokenizer = _tokenizer(store)
    for shard in store.shards():
        for row, found in enumerate(_table(store, shard)["id"]):
            if found == identifier:
                yield _document(store, shard, row, tokenizer)


def containing(store: Store, text: str) -> Iterator[Found]:
    """The documents in which a text stands, in store order."""
    tokenizer = _tokenizer(store)
    for shard in store.shards():
        tokens, offsets = store.tokens(shard), store.document_offsets(shard)
        for first in range(0, shard.documents, _DECODED):
            rows = range(first, min(first + _DECODED, shard.documents))
            ids = [tokens[offsets[row] : offsets[row + 1] - 1].tolist() for row in rows]
            for row, decoded in zip(rows, tokenizer.decode_batch(ids), strict=True):
                if text in decoded:
                    yield _document(store, shard, row, tokenizer)


def pieces(store: Store, found: Found) -> list[str]:
    """The text of each token."""
    tokenizer = _tokenizer(store)
    return tokenizer.decode_batch([[token] for token in found.tokens])


def _document(store: Store, shard: Shard, row: int, tokenizer: Tokenizer) -> Found:
    table, offsets = _table(store, shard), store.document_offsets(shard)
    tokens = store.tokens(shard)[offsets[row] : offsets[row + 1]].tolist()
    return Found(
        id=table["id"][row],
        source=shard.source,
        split=shard.split,
        shard=shard.stem,
        offset=int(offsets[row]),
        text_bytes=table["text_bytes"][row],
        text=tokenizer.decode(tokens[:-1]),
        tokens=tokens,
    )


def _table(store: Store, shard: Shard) -> dict[str, list[Any]]:
    file = store.path / f"{shard.stem}.docs.parquet"
    try:
        return pq.read_table(file, columns=["id", "text_bytes"]).to_pydict()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: run `bloomery data check {store.path}`") from error


def _tokenizer(store: Store) -> Tokenizer:
    return Tokenizer.load(store.tokenizer)
