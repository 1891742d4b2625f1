"""Small token stores for tests, with ids that the test chooses."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from data_pipeline.store import Store, StoreWriter, TokenizedDocument
from data_pipeline.tokenizer import SPECIAL_TOKENS, Tokenizer, train

END = 0
FIRST_ID = len(SPECIAL_TOKENS)
"""The first id that is no special token."""

Documents = Sequence[Sequence[int]]


@cache
def small_tokenizer(vocabulary_size: int = 384) -> Tokenizer:
    """A trained tokenizer; ids in test stores may go beyond its vocabulary, as far as the store's type does."""
    words = (f"word{number} number{number}{number}" for number in range(200))
    with TemporaryDirectory() as directory:
        return train(words, vocabulary_size, Path(directory) / "tokenizer.json")


def tokenized(documents: Documents, prefix: str) -> Iterator[TokenizedDocument]:
    """Documents of given ids, without their ends."""
    for number, tokens in enumerate(documents):
        yield TokenizedDocument(id=f"{prefix}-{number}", tokens=list(tokens), text_bytes=3 * len(tokens))


def make_store(
    path: Path,
    training: Mapping[str, Documents],
    validation: Mapping[str, Documents] | None = None,
    *,
    shard_tokens: int | None = None,
) -> Store:
    """A finished store of {source: documents}, each a list of ids without the end."""
    writer = StoreWriter(path, tokenizer=small_tokenizer(), configuration="test")
    for split, sources in (("training", training), ("validation", validation or {})):
        for source, documents in sources.items():
            left = tokenized(documents, source)
            while writer.add_shard(source, split, left, max_tokens=shard_tokens):
                pass
    return writer.finish()


def distinct_documents(lengths: Sequence[int], first_id: int = FIRST_ID) -> list[list[int]]:
    """Documents of the given lengths in which no id stands twice."""
    documents = []
    for length in lengths:
        documents.append(list(range(first_id, first_id + length)))
        first_id += length
    return documents
