"""An existing Megatron corpus (`.bin` and `.idx`) as a token store, without tokenising anew.

Every sequence becomes a document as it is; the end-of-document token that Megatron's preprocessing appends stands at
its end already, else it is put there. The tokenizer that made the ids has to be given: the store keeps it, and the
bytes of each text, which bits per byte need, come from decoding. Ids, order and borders are those of the files; a part
may be held out for validation by the number of the sequence.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.indexed import Index, read_ids, read_index
from data_pipeline.progress import Meter, Screen
from data_pipeline.stages import fingerprint_of
from data_pipeline.store import TRAINING, VALIDATION, Store, StoreWriter, TokenizedDocument
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import UserError
from parallel.common.files import hash_file

_DECODED = 512


def import_megatron(
    prefixes: Mapping[str, Path], store: Path, *, tokenizer: Tokenizer, validation_share: float, shard_tokens: int
) -> Store:
    """Writes a store of some corpora, each a source; goes on where it was killed.

    Args:
        prefixes: Paths of each corpus without `.bin` and `.idx`, by the name of the source.
        store: Directory to write.
        tokenizer: The one that made the ids.
        validation_share: Share of the sequences that are held out.
        shard_tokens: Tokens after which a shard is sealed.

    Raises:
        UserError: a file is missing or damaged, or holds ids that the tokenizer does not have.
    """
    hashes = [hash_file(_file(prefix, ending)) for prefix in prefixes.values() for ending in ("idx", "bin")]
    settings = [list(prefixes), validation_share, shard_tokens]
    writer = StoreWriter(store, tokenizer=tokenizer, configuration=fingerprint_of("store", settings, hashes))
    screen = Screen()
    for name, prefix in [] if writer.finished else prefixes.items():
        index = read_index(_file(prefix, "idx"))
        ids = read_ids(_file(prefix, "bin"), index.dtype)
        _refuse_foreign(prefix, index, ids, tokenizer)
        held = _held_out(name, len(index.lengths), validation_share)
        with screen.meter(name, len(ids)) as meter:
            for split, rows in ((TRAINING, np.flatnonzero(~held)), (VALIDATION, np.flatnonzero(held))):
                rows = rows[writer.documents_written(name, split) :]
                documents = _documents(name, rows.tolist(), index, ids, tokenizer, meter)
                while writer.add_shard(name, split, documents, max_tokens=shard_tokens):
                    pass
        screen.line(name, f"{len(index.lengths):,} sequences, {int(index.lengths.sum(dtype=np.int64)):,} tokens")
    return writer.finish()


def _file(prefix: Path, ending: str) -> Path:
    file = prefix.with_name(f"{prefix.name}.{ending}")
    if not file.is_file():
        raise UserError(f"{file} is missing: expected a Megatron corpus, {prefix.name}.bin and {prefix.name}.idx")
    return file


def _refuse_foreign(prefix: Path, index: Index, ids: np.memmap, tokenizer: Tokenizer) -> None:
    ends = index.byte_offsets // index.dtype.itemsize + index.lengths
    if len(ends) and int(ends.max()) > len(ids):
        raise UserError(f"{prefix}.bin is cut off: it holds {len(ids):,} tokens, its index speaks of {ends.max():,}")
    most = max((int(ids[start : start + (1 << 24)].max()) for start in range(0, len(ids), 1 << 24)), default=0)
    if most >= tokenizer.vocabulary_size:
        raise UserError(
            f"{prefix}.bin holds the id {most:,}, which the tokenizer of {tokenizer.vocabulary_size:,} tokens does not "
            f"have: give the one that the corpus was made with"
        )


def _held_out(name: str, count: int, share: float) -> NDArray[np.bool_]:
    hashes = [xxhash.xxh3_64_intdigest(f"{name}:{number}".encode()) for number in range(count if share else 0)]
    return np.array(hashes, dtype=np.uint64) < np.uint64(int(share * 2.0**64)) if share else np.zeros(count, dtype=bool)


def _documents(
    name: str, rows: list[int], index: Index, ids: np.memmap, tokenizer: Tokenizer, meter: Meter
) -> Iterator[TokenizedDocument]:
    for first in range(0, len(rows), _DECODED):
        chosen = rows[first : first + _DECODED]
        tokens = []
        for row in chosen:
            start = int(index.byte_offsets[row]) // index.dtype.itemsize
            found = ids[start : start + int(index.lengths[row])].tolist()
            tokens.append(found[:-1] if found and found[-1] == tokenizer.end_of_document else found)
        for row, found, text in zip(chosen, tokens, tokenizer.decode_batch(tokens), strict=True):
            yield TokenizedDocument(id=f"{name}:{row}", tokens=found, text_bytes=len(text.encode()))
            meter.advance(len(found))
