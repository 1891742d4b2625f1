"""What a model has to beat, on the same validation bytes: knowing only how frequent each token is, and `xz -9`.

Both are given in bits per byte of text, like the model's own figure, so that tokenizers and vocabularies compare.
Imports without torch.
"""

import itertools
import lzma
import math

import numpy as np

from data_pipeline.store import TRAINING, VALIDATION, Store
from data_pipeline.tokenizer import Tokenizer


def text_bytes(store: Store, source: str | None = None) -> int:
    """Length of the validation text in UTF-8, of one source or of all."""
    return sum(shard.text_bytes for shard in store.shards(split=VALIDATION, source=source))


def unigram_bits_per_byte(store: Store, source: str | None = None) -> float:
    """Bits per byte to code the validation tokens with the frequencies of the training tokens.

    It is the entropy of tokens that are drawn one by one; frequencies are counts plus one, so that a token that was
    never trained on has a cost and not an infinite one.
    """
    trained = store.token_counts(split=TRAINING, source=source) + 1
    bits = -np.log2(trained / trained.sum())
    return float((store.token_counts(split=VALIDATION, source=source) * bits).sum() / text_bytes(store, source))


def xz_bits_per_byte(store: Store, source: str | None = None) -> float:
    """Bits per byte of the validation text, compressed as one stream by xz at its highest preset."""
    tokenizer = Tokenizer.load(store.tokenizer)
    compressor = lzma.LZMACompressor(preset=9)
    compressed = 0
    for shard in store.shards(split=VALIDATION, source=source):
        tokens, offsets = store.tokens(shard), store.document_offsets(shard)
        for first, end in itertools.pairwise(offsets.tolist()):
            text = tokenizer.decode(tokens[first : end - 1].tolist())
            compressed += len(compressor.compress(text.encode()))
    compressed += len(compressor.flush())
    return 8 * compressed / text_bytes(store, source)


def bits_per_byte(nats: float, length_bytes: int) -> float:
    """A summed loss in nats as bits per byte of text."""
    return nats / math.log(2) / length_bytes
