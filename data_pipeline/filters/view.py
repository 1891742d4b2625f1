"""One document as the rules look at it: lines, words and repeated n-grams, each worked out once and when asked for.

Writing without spaces (Chinese, Japanese) has no words that a program could split off: its characters are the tokens,
and two words are counted for three of them. Korean has spaces, but words of two or three syllables.
"""

import re
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_UNSPACED = r"\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_HANGUL = re.compile(r"[\uac00-\ud7af]")
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_LETTER = re.compile(r"[^\W\d_]")
_ALPHABETIC_WORD = re.compile(r"\S*[^\W\d_]\S*")
_PARAGRAPH = re.compile(r"\n{2,}")
_UNSPACED_SHARE = 0.3
"""Of all letters, from which a document counts as one without spaces."""
_ROLL = 0x9E3779B97F4A7C15


class View:
    """A text and what is counted in it."""

    def __init__(self, text: str, language: str | None = None) -> None:
        """`language` is a two-letter code, `code`, or None where it is not known."""
        self.text = text
        self.known_language = language

    @property
    def is_code(self) -> bool:
        return self.known_language == "code"

    @cached_property
    def unspaced_characters(self) -> int:
        return 0 if self.text.isascii() else len(_UNSPACED_CHARACTER.findall(self.text))

    @cached_property
    def is_unspaced(self) -> bool:
        """Chinese or Japanese, as its letters say."""
        count = self.unspaced_characters
        return count > 0 and count >= _UNSPACED_SHARE * len(_LETTER.findall(self.text))

    @cached_property
    def is_hangul(self) -> bool:
        if self.text.isascii() or self.is_unspaced:
            return False
        return len(_HANGUL.findall(self.text)) >= _UNSPACED_SHARE * len(_LETTER.findall(self.text))

    @property
    def language(self) -> str:
        """The language that is known, else the one that the script tells."""
        return self.known_language if self.known_language is not None else self.language_of_script

    @cached_property
    def language_of_script(self) -> str:
        """Japanese, Chinese, Korean, else English."""
        if self.is_unspaced:
            return "ja" if _KANA.search(self.text) else "zh"
        return "ko" if self.is_hangul else "en"

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not empty, stripped."""
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [paragraph for raw in _PARAGRAPH.split(self.text) if (paragraph := raw.strip())]

    @cached_property
    def words(self) -> list[str]:
        """What stands between spaces."""
        return self.text.split()

    @cached_property
    def word_count(self) -> int:
        return self.count_words(self.text) if self.is_unspaced else len(self.words)

    def count_words(self, text: str) -> int:
        """Words of a part of the document."""
        if not self.is_unspaced:
            return len(text.split())
        unspaced = len(_UNSPACED_CHARACTER.findall(text))
        return len(_TOKEN.findall(text)) - unspaced + -(-unspaced * 2 // 3)

    @cached_property
    def alphabetic_share(self) -> float:
        """Share of the words that hold a letter; every unspaced character does."""
        if self.is_unspaced:
            tokens = _TOKEN.findall(self.text)
            return sum(_LETTER.search(token) is not None for token in tokens) / max(1, len(tokens))
        return len(_ALPHABETIC_WORD.findall(self.text)) / max(1, len(self.words))

    @cached_property
    def _tokens(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """A number for each token, equal for equal ones, and its characters; both [tokens]."""
        numbers: dict[str, int] = {}
        found = _TOKEN.findall(self.text.lower())
        ids = np.array([numbers.setdefault(token, len(numbers)) for token in found], dtype=np.uint64)
        return ids, np.array([len(token) for token in found], dtype=np.int64)

    def _ngrams(self, n: int) -> tuple[int, NDArray[np.uint64], NDArray[np.int64]]:
        """n as it counts here, a hash for each n-gram, and where the characters of the first k tokens end [k]."""
        n = -(-n * 3 // 2) if self.is_unspaced else n
        ids, characters = self._tokens
        ends = np.concatenate(([0], np.cumsum(characters)))
        count = len(ids) - n + 1
        if count < 1:
            return n, np.zeros(0, np.uint64), ends
        hashes = np.zeros(count, dtype=np.uint64)
        for place in range(n):
            hashes = hashes * np.uint64(_ROLL) + ids[place : place + count] + np.uint64(1)
        return n, hashes, ends

    def top_ngram_share(self, n: int) -> float:
        """Share of the characters that the commonest n-gram covers; 0 where none stands twice."""
        n, hashes, ends = self._ngrams(n)
        if not len(hashes):
            return 0.0
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        most = int(np.argmax(counts))
        if counts[most] < 2:
            return 0.0
        covered = int(counts[most]) * int(ends[first[most] + n] - ends[first[most]])
        return min(1.0, covered / max(1, int(ends[-1])))

    def duplicate_ngram_share(self, n: int) -> float:
        """Share of the characters inside n-grams that stood before; none is counted twice."""
        n, hashes, ends = self._ngrams(n)
        if not len(hashes):
            return 0.0
        repeated = np.ones(len(hashes), dtype=bool)
        repeated[np.unique(hashes, return_index=True)[1]] = False
        change = np.zeros(len(ends), dtype=np.int64)
        places = np.flatnonzero(repeated)
        change[places] += 1
        change[places + n] -= 1
        covered = np.cumsum(change)[:-1] > 0
        return float(np.diff(ends)[covered].sum() / max(1, ends[-1]))
