"""What the ids of a tokenizer mean to an objective: the marks that it puts into samples, and where words begin.

A mark is a token of the tokenizer's own where it has one under a name in use (`[MASK]`, `<extra_id_0>`), so that a
published model goes on with what it knows; otherwise one of the 64 reserved tokens:

    reserved 00 01 02    fill-in-the-middle (`middle`)
    reserved 03          covers a token (masked language modelling)
    reserved 04 05       first token of a pair of segments, and the end of each
    reserved 06 07       around what an example teaches (`examples.kinds`)
    reserved 08 09       around a turn of a conversation
    reserved 10          between the examples of a row
    reserved 11 to 15    free
    reserved 16 to 63    48 sentinels (span corruption)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.store import Store
from data_pipeline.tokenizer import RESERVED, Tokenizer
from parallel.common.errors import UserError

_MASK = ("[MASK]", "<mask>", RESERVED[3])
_FIRST = ("[CLS]", RESERVED[4])
_SEPARATOR = ("[SEP]", RESERVED[5])
_SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
_OWN_SENTINELS = RESERVED[16:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """Ids of a store's tokenizer."""

    mask: int
    first: int
    separator: int
    sentinels: NDArray[np.int64]
    """In the order in which they are used."""
    ordinary: NDArray[np.int64]
    """Those that stand for text: all but the special ones, ascending."""
    is_ordinary: NDArray[np.bool_]
    """[vocabulary]."""
    joins_left: NDArray[np.bool_]
    """[vocabulary]: the token goes on with a word, if one ended before it."""
    joins_right: NDArray[np.bool_]
    """[vocabulary]: the token ends inside a word, if one goes on after it."""

    def word_begins(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where a word begins in some tokens; everything that is not part of a longer word is one by itself."""
        begins = np.ones(len(tokens), dtype=np.bool_)
        begins[1:] = ~(self.joins_left[tokens[1:]] & self.joins_right[tokens[:-1]])
        return begins


def marks(store: Store) -> Marks:
    """Looks a store's tokenizer up.

    Raises:
        UserError: it has no reserved tokens.
    """
    return of_tokenizer(Tokenizer.load(store.tokenizer))


def of_tokenizer(tokenizer: Tokenizer) -> Marks:
    """As `marks`."""
    ids, special = tokenizer.ids(), tokenizer.special_ids()
    if RESERVED[-1] not in ids:
        raise UserError("this objective needs the reserved tokens, and the tokenizer lacks them")
    is_ordinary = np.zeros(tokenizer.vocabulary_size, dtype=np.bool_)
    is_ordinary[[number for number in ids.values() if number not in special]] = True
    joins_left, joins_right = _joins(ids, tokenizer.vocabulary_size, byte_level=tokenizer.byte_level)
    names = _SENTINELS if all(name in ids for name in _SENTINELS) else _OWN_SENTINELS
    return Marks(
        mask=_known(ids, _MASK),
        first=_known(ids, _FIRST),
        separator=_known(ids, _SEPARATOR),
        sentinels=np.array([ids[name] for name in names], dtype=np.int64),
        ordinary=np.flatnonzero(is_ordinary),
        is_ordinary=is_ordinary,
        joins_left=joins_left & is_ordinary,
        joins_right=joins_right & is_ordinary,
    )


def _known(ids: Mapping[str, int], names: tuple[str, ...]) -> int:
    return next(ids[name] for name in names if name in ids)


def _joins(ids: Mapping[str, int], size: int, *, byte_level: bool) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether each id goes on with a word to its left, and to its right."""
    left, right = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
    pieces = any(name.startswith("##") for name in ids)
    for name, number in ids.items():
        if byte_level:
            left[number], right[number] = _bytes_join(bytes(_BYTES.get(letter, 0) for letter in name))
        elif pieces:  # WordPiece says it of each token that goes on
            left[number], right[number] = name.startswith("##"), True
        else:
            text = name.removeprefix("\u2581")
            left[number] = text == name and _in_word(name[:1])
            right[number] = _in_word(text[-1:])
    return left, right


def _in_word(letter: str) -> bool:
    """Whether words are made of several such letters; those of unspaced writing are words by themselves."""
    return letter.isalnum() and not "\u2e80" <= letter <= "\u9fff" and not "\uf900" <= letter <= "\ufaff"


def _bytes_join(content: bytes) -> tuple[bool, bool]:
    """Of a byte-level token; one that begins or ends inside a letter goes on with it."""
    text = content.decode("utf-8", errors="replace")
    inside = content[0] & 0xC0 == 0x80
    cut_letter = text[0] == "\ufffd" and 0xC3 <= content[0] <= 0xDF  # Latin, Greek, Cyrillic and more, two bytes each
    return inside or cut_letter or _in_word(text[0]), text[-1] == "\ufffd" or _in_word(text[-1])


def _byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [number for number in range(256) if number not in printable]
    return {chr(number): number for number in printable} | {
        chr(256 + place): number for place, number in enumerate(others)
    }


_BYTES = _byte_alphabet()
