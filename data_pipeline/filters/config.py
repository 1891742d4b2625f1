"""Configuration of the filters: each rule is off until it is switched on, with the thresholds of its paper."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from data_pipeline.filters.registry import OWN
from parallel.common.errors import Problem


class Pii(StrEnum):
    """Personal data that is masked."""

    email = "email"
    ip = "ip"
    """Public IPv4 and IPv6 addresses; private ones, local ones and version numbers stay."""
    phone = "phone"
    """With a country code, American with an area code, Chinese mobile."""
    national_id = "national_id"
    """Chinese identity numbers and IBANs whose check digits are right, American social security numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthConfig:
    """Words in a document; of Chinese and Japanese, two characters for each three."""

    min_words: int = 0
    max_words: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GopherQualityConfig:
    """Quality rules of Gopher (Rae et al. 2021, A1.1)."""

    enabled: bool = False
    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_length: float = 3.0
    """Characters; not asked of writing without spaces."""
    max_mean_word_length: float = 10.0
    max_symbols_per_word: float = 0.1
    """`#` and ellipses, each."""
    max_bullet_lines: float = 0.9
    """Share of lines that begin with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: float = 0.8
    """Share of words with a letter in them."""
    min_stop_words: int = 2
    """Different stop words of the document's language (English, Chinese, Japanese, Korean; others are not asked)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GopherRepetitionConfig:
    """Repetition rules of Gopher (table A1); n-grams of unspaced writing are half as long again, in characters."""

    enabled: bool = False
    max_duplicate_lines: float = 0.3
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_line_characters: float = 0.2
    max_duplicate_paragraph_characters: float = 0.2
    max_top_ngrams: tuple[float, ...] = (0.20, 0.18, 0.16)
    """Share of the characters that the commonest 2-, 3-, 4-gram covers."""
    max_duplicate_ngrams: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    """Share of the characters inside repeated 5- to 10-grams."""


@dataclass(frozen=True, kw_only=True, slots=True)
class C4Config:
    """Rules of C4 (Raffel et al. 2020): lines are taken out, then documents dropped. Not for source code."""

    enabled: bool = False
    require_terminal_punctuation: bool = False
    """Take out lines that end in no terminal punctuation (FineWeb found that this costs more than it gives)."""
    min_words_per_line: int = 3
    min_sentences: int = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class FineWebConfig:
    """The rules that FineWeb added (Penedo et al. 2024). Not for source code."""

    enabled: bool = False
    min_punctuated_lines: float = 0.12
    """Share of lines that end in terminal punctuation."""
    max_short_lines: float = 0.67
    """Share of lines below `short_line_characters`."""
    short_line_characters: int = 30
    """A character of unspaced writing counts three."""
    max_duplicate_line_characters: float = 0.1
    """Share of the characters in lines that stood before."""
    max_newlines_per_word: float = 0.3


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeConfig:
    """Rules for source code (Chen et al. 2021, as The Stack took them), for sources with `language: code`."""

    enabled: bool = False
    max_line_characters: int = 1000
    max_mean_line_characters: float = 100.0
    min_alphanumeric: float = 0.25
    """Share of letters and digits in all characters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """Language identification, offline (extra `filters`)."""

    keep: tuple[str, ...] = ()
    """ISO 639-1 codes that are kept, `[en, zh]`; empty keeps all. A source with a `language` keeps only that one."""
    min_confidence: float = 0.5
    """A document whose language is less certain than this is dropped."""

    identify: bool = False
    """Count the languages of each source even where nothing is dropped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FiltersConfig:
    """Filters, in this order; a document is counted under the first rule that drops it."""

    language: LanguageConfig = field(default_factory=LanguageConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    gopher_repetition: GopherRepetitionConfig = field(default_factory=GopherRepetitionConfig)
    gopher_quality: GopherQualityConfig = field(default_factory=GopherQualityConfig)
    c4: C4Config = field(default_factory=C4Config)
    fineweb: FineWebConfig = field(default_factory=FineWebConfig)
    code: CodeConfig = field(default_factory=CodeConfig)
    own: dict[str, Any] = field(default_factory=dict)
    """Filters that plugins register, by name, each with its options; after all others."""
    mask: tuple[Pii, ...] = ()
    """Personal data to replace by `<EMAIL>`, `<IP>`, `<PHONE>`, `<NATIONAL_ID>` in what is kept."""

    @property
    def enabled(self) -> bool:
        """Anything is to be done."""
        return self != FiltersConfig()

    def problems(self, key: str) -> Iterator[Problem]:
        """Numbers that make no sense, and filters that nobody registered."""
        for name in self.own:
            if name not in OWN:
                known = ", ".join(OWN) or "none is registered: does `plugins` name the module?"
                yield Problem(key=f"{key}.own.{name}", got=name, legal=f"a filter of a plugin ({known})")
        if not 0 <= self.language.min_confidence <= 1:
            got = self.language.min_confidence
            yield Problem(key=f"{key}.language.min_confidence", got=got, legal="a number from 0 to 1")
        for code in self.language.keep:
            if len(code) != 2 or not code.islower():
                yield Problem(key=f"{key}.language.keep", got=code, legal="two-letter codes such as en or zh")
        if self.length.max_words is not None and self.length.max_words < self.length.min_words:
            legal = f"at least min_words = {self.length.min_words}"
            yield Problem(key=f"{key}.length.max_words", got=self.length.max_words, legal=legal)
