"""Text to token ids and back, over Hugging Face `tokenizers`.

Idea: a tokenizer is one file, `tokenizer.json`. `train` makes one (byte-level BPE, so that every text round-trips:
`decode(encode(x)) == x`); a user's own file is used as it is.

Contract: every tokenizer has an end-of-document token, a padding token and 64 reserved tokens for chat and
objectives, and a vocabulary size padded up to a multiple of 128. In a trained one they are ids 0, 1 and 2 to 65. A
user's file that lacks some gets them appended after its last id, always in the same order, so that no id it knows
moves; as its end of document it may have any of `END_OF_DOCUMENT_NAMES`, or one that the caller names. Text is only
text: a document that contains the characters `<|endofdocument|>` does not end there.

Splitting: words and digits as usual (a word with the space before it, at most three digits). Writing without spaces
(Chinese, Japanese, Thai, ...) would make words of whole clauses, nearly all unique, and training keeps every unique
word: such runs are cut into pieces of at most four characters while training, but encoded whole. On 9 MB of Chinese
(8,192 tokens, held-out text): cut at four for both 3.22 bytes a token, cut only while training 3.29, never cut 3.30.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from parallel.common.errors import UserError
from parallel.common.files import hash_bytes, write_text

logger = logging.getLogger(__name__)

END_OF_DOCUMENT = "<|endofdocument|>"
PADDING = "<|padding|>"
RESERVED = tuple(f"<|reserved_{index:02d}|>" for index in range(64))
SPECIAL_TOKENS = (END_OF_DOCUMENT, PADDING, *RESERVED)

END_OF_DOCUMENT_NAMES = (
    END_OF_DOCUMENT,
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "</s>",
    "<eos>",
    "<|eos|>",
)
"""What tokenizers in use call it, in the order in which they are looked for."""
PADDING_NAMES = (PADDING, "<|pad|>", "<pad>", "[PAD]", "<\uff5c\u2581pad\u2581\uff5c>")

VOCABULARY_MULTIPLE = 128
"""Vocabulary sizes are multiples of this in every layout, so that an embedding divides by any tensor degree."""

_BYTES = 256
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー々〆"
_TRAINING_RUN = "{1,4}"
_WHOLE_RUN = "+"


def _splitter(run: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer; `run` is the quantifier of a piece of unspaced writing."""
    pattern = (
        rf"[{_UNSPACED}]{run}"
        r"|(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}&&[^{_UNSPACED}]]+"
        r"|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


class Tokenizer:
    """Ids for texts; see the module's docstring for what every tokenizer has."""

    def __init__(self, backend: HuggingFaceTokenizer, *, end_of_document: str | None = None) -> None:
        """Takes over `backend`: special tokens that it lacks are appended, truncation and padding switched off.

        Raises:
            UserError: the vocabulary has no token `end_of_document`, or its ids collide.
        """
        backend.no_truncation()
        backend.no_padding()
        if end_of_document is not None and backend.token_to_id(end_of_document) is None:
            raise UserError(
                f"the tokenizer has no token {end_of_document!r} that could end a document: name one that it has"
            )
        end_names = END_OF_DOCUMENT_NAMES if end_of_document is None else (end_of_document,)
        end = _first_known(backend, end_names) or END_OF_DOCUMENT
        padding = _first_known(backend, PADDING_NAMES) or PADDING
        wanted = (end, padding, *RESERVED)
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in wanted])
        ids = backend.get_vocab(with_added_tokens=True)
        if len(set(ids.values())) != len(ids):
            raise UserError("the tokenizer gives one id to several tokens: its ids must have no gaps")
        backend.encode_special_tokens = True
        self._backend = backend
        self.end_of_document: int = ids[end]
        """Id that ends every document in the store and begins the next one in a sample."""
        self.padding: int = ids[padding]
        """Id that fills places of weight zero."""
        self.vocabulary_size: int = padded_vocabulary_size(max(ids.values()) + 1)
        """Rows of the embedding: the ids in use, padded up to a multiple of 128."""

    @classmethod
    def load(cls, path: Path, *, end_of_document: str | None = None) -> "Tokenizer":
        """Reads a `tokenizer.json`, one that `train` made or a user's own.

        Args:
            path: The file, or a directory that holds it.
            end_of_document: The token that ends a document, where it is none of `END_OF_DOCUMENT_NAMES`.

        Raises:
            UserError: the file is missing, is no tokenizer, or lacks the token named.
        """
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"there is no tokenizer at {file}: expected a tokenizer.json of Hugging Face tokenizers")
        try:
            backend = HuggingFaceTokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:
            # `tokenizers` raises plain Exception for everything that its parser dislikes.
            raise UserError(f"{file} is not a tokenizer.json of Hugging Face tokenizers: {error}") from error
        return cls(backend, end_of_document=end_of_document)

    def to_json(self) -> str:
        """The content of its `tokenizer.json`, with the special tokens that were added; the same bytes every time."""
        return _content(self._backend)

    def save(self, path: Path) -> None:
        """Writes `tokenizer.json`, whole or not at all."""
        write_text(path, self.to_json())

    def save_around(self, path: Path, before: Sequence[int], behind: Sequence[int]) -> None:
        """Writes one that puts these ids around each text, for programs that leave that to the tokenizer."""
        names = [self.token(number) for number in (*before, *behind)]
        first, last = names[: len(before)], names[len(before) :]
        changed = HuggingFaceTokenizer.from_str(self._backend.to_str())
        changed.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, "$B:1", *(f"{name}:1" for name in last)],
            special_tokens=list(zip(names, (*before, *behind), strict=True)),
        )
        write_text(path, _content(changed))

    @property
    def around(self) -> tuple[list[int], list[int]]:
        """What its file puts before and behind each text, for programs that leave that to the tokenizer."""
        whole, plain = (self._backend.encode("a", add_special_tokens=add).ids for add in (True, False))
        first = next(place for place in range(len(whole) + 1) if whole[place : place + len(plain)] == plain)
        return whole[:first], whole[first + len(plain) :]

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of the file that `save` writes."""
        return hash_bytes(self.to_json().encode())

    def ids(self) -> dict[str, int]:
        """Every token by its name, as the file writes it."""
        return self._backend.get_vocab(with_added_tokens=True)

    def special_ids(self) -> set[int]:
        """Ids that stand for no text."""
        return {number for number, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @property
    def byte_level(self) -> bool:
        """Whether tokens are bytes, written in the alphabet of GPT-2."""
        return '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])

    def token(self, number: int) -> str:
        """The name of an id in use."""
        name = self._backend.id_to_token(number)
        assert name is not None
        return name

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores; nothing is put before or after it, and special tokens are only text."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of one text in which names of special tokens are those tokens, and where each begins, in characters."""
        self._backend.encode_special_tokens = False
        try:
            found = self._backend.encode(text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = True
        return found.ids, [first for first, _ in found.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens appear by name, ids beyond the vocabulary as nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The texts of several lists of ids, as `decode` gives them."""
        return self._backend.decode_batch([list(ids) for ids in sequences], skip_special_tokens=False)


def _content(backend: HuggingFaceTokenizer) -> str:
    return json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=1) + "\n"


def _first_known(backend: HuggingFaceTokenizer, names: Sequence[str]) -> str | None:
    return next((name for name in names if backend.token_to_id(name) is not None), None)


def padded_vocabulary_size(tokens: int) -> int:
    """The next multiple of 128."""
    return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def train(texts: Iterator[str], vocabulary_size: int, destination: Path) -> Tokenizer:
    """Trains byte-level BPE on a sample of texts and writes it; the same texts give the same bytes.

    Too small a sample yields fewer tokens than were asked for; this is logged, and the size is what was reached,
    padded up. Memory grows with the sample, about 40 bytes a byte of Chinese and less for other writing: bound it.

    Args:
        texts: The sample; read once.
        vocabulary_size: Tokens, the special ones included; a multiple of 128.
        destination: The `tokenizer.json` to write.

    Raises:
        UserError: the size cannot be had.
    """
    least = padded_vocabulary_size(_BYTES + len(SPECIAL_TOKENS))
    if vocabulary_size < least or vocabulary_size % VOCABULARY_MULTIPLE:
        raise UserError(
            f"data.tokenizer.vocabulary_size is {vocabulary_size}: expected a multiple of {VOCABULARY_MULTIPLE}, "
            f"{least} or more"
        )
    backend = HuggingFaceTokenizer(models.BPE())
    backend.pre_tokenizer = _splitter(_TRAINING_RUN)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.pre_tokenizer = _splitter(_WHOLE_RUN)
    reached = backend.get_vocab_size(with_added_tokens=True)
    if reached < vocabulary_size:
        logger.warning("the sample yields a vocabulary of %d tokens, not %d", reached, vocabulary_size)
    tokenizer = Tokenizer(backend)
    tokenizer.save(destination)
    return tokenizer
