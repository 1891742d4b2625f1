"""Text to ids on the way into a store: by `tokenizers`, or by gigatoken where that gives the same ids.

gigatoken encodes byte-level and SentencePiece BPE some tens of times faster, for the splitting rules that it knows
(those of GPT-2, Llama, Qwen and others; not those of a tokenizer that we train). It is asked for by
`data.tokenizer.encoder: gigatoken` (extra `fast`).

Contract: a store holds the ids of `tokenizers`, whoever computed them. Before the first text and then in every MiB of
text, one document in 32 (at least one) is encoded by both. Where they differ a warning says so, the shard that is
being written is begun anew, and `tokenizers` does it and all that follow.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

from data_pipeline.config import Encoding
from data_pipeline.tokenizer import Tokenizer
from parallel.common.errors import UserError
from parallel.common.lazy import Lazy

gigatoken = Lazy("gigatoken")
logger = logging.getLogger(__name__)

_CHECKED_ONE_IN = 32


class EncodersDiffer(Exception):
    """What was encoded since the last sealed shard is to be encoded again."""


class Encoder:
    """Encodes with a tokenizer, as fast as that can be had."""

    def __init__(self, tokenizer: Tokenizer, kind: Encoding) -> None:
        """Looks whether the fast way can be gone.

        Raises:
            UserError: gigatoken is wanted and not installed.
        """
        self._tokenizer = tokenizer
        self._fast: Any = None
        if kind is Encoding.gigatoken:
            self._fast = self._opened()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `Tokenizer.encode_batch`.

        Raises:
            EncodersDiffer: a document of the sample got other ids; the next call is answered by `tokenizers`.
        """
        if self._fast is None:
            return self._tokenizer.encode_batch(texts)
        found = self._fast.encode_batch_list(list(texts))
        if self._tokenizer.encode_batch(texts[::_CHECKED_ONE_IN]) != found[::_CHECKED_ONE_IN]:
            self._fast = None
            logger.warning("gigatoken gives other ids than tokenizers: tokenizers encodes from here on, slower")
            raise EncodersDiffer
        return found

    def _opened(self) -> Any:
        """gigatoken with the tokenizer's vocabulary; None where it cannot do what the tokenizer does."""
        if not gigatoken.is_installed:
            raise UserError(
                "data.tokenizer.encoder=gigatoken needs gigatoken: install it with `pip install bloomery[fast]`"
            )
        content = json.loads(self._tokenizer.to_json())
        special = [token["content"] for token in content["added_tokens"] if token["special"]]
        # In documents special tokens are only text.
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        fast: Any = None
        try:
            fast = gigatoken.Tokenizer.from_json(json.dumps(content))
            probes = [" ".join(["It's 12345 naïve  words:\n\n\t中文字、カナ 한국 🙂 e\u0301", *special]), *special, ""]
            same = fast.encode_batch_list(probes) == self._tokenizer.encode_batch(probes)
            why = "it gives other ids for a probe"
        except (ValueError, RuntimeError, KeyError) as error:
            same, why = False, str(error).partition("\n")[0][:200]
        if not same:
            logger.warning("gigatoken cannot encode as this tokenizer does (%s): tokenizers encodes, slower", why)
            return None
        return fast
