"""The rules: each takes a view of a document and its settings and returns why the document goes, or None.

They are the published ones (Gopher, C4, FineWeb, the code rules of Codex), with what they need for Chinese, Japanese,
Korean and source code. Rules about prose are not asked of source code.
"""

import re
from collections.abc import Callable, Sequence

from data_pipeline.filters.config import (
    C4Config,
    CodeConfig,
    FiltersConfig,
    FineWebConfig,
    GopherQualityConfig,
    GopherRepetitionConfig,
    LengthConfig,
)
from data_pipeline.filters.registry import OWN
from data_pipeline.filters.view import View

STOP_WORDS = {
    "en": ("the", "be", "to", "of", "and", "that", "have", "with"),
    "zh": ("的", "了", "是", "在", "不", "和", "有", "我", "这", "這", "之", "也", "个", "個", "与", "與"),
    "ja": ("の", "は", "に", "を", "た", "が", "で", "て", "と", "し"),
    "ko": ("은", "는", "이", "가", "을", "를", "에", "의", "로", "도"),
}
"""Of languages without spaces between words, and of Korean, characters."""
_TERMINAL = tuple(".!?\"')]:;\u201d\u2019\u2026\u3002\uff01\uff1f\u300d\u300f\uff09\u300b\u3009\uff1a\uff1b")
"""Of Latin writing, and of Chinese and Japanese."""
_END = re.compile(r"[.!?]+(?=[\s\"'\u201d\u2019)\]]|$)|[\u3002\uff01\uff1f\u2026]+")
"""The end of a sentence."""
_BULLETS = ("•", "‣", "▶", "-", "*", "●", "・", "◦", "·")
_ELLIPSES = ("...", "…", "。。。")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_UNSPACED_WIDTH = 3
"""Latin characters that say as much as one Chinese one, for the length of lines."""

Rule = Callable[[View], str | None]


def rules(settings: FiltersConfig) -> list[Rule]:
    """The rules that are switched on, in their order."""
    chosen: list[Rule] = []
    if settings.length != LengthConfig():
        chosen.append(lambda view: length(view, settings.length))
    if settings.gopher_repetition.enabled:
        chosen.append(lambda view: gopher_repetition(view, settings.gopher_repetition))
    if settings.gopher_quality.enabled:
        chosen.append(lambda view: gopher_quality(view, settings.gopher_quality))
    if settings.c4.enabled:
        chosen.append(lambda view: c4(view, settings.c4))
    if settings.fineweb.enabled:
        chosen.append(lambda view: fineweb(view, settings.fineweb))
    if settings.code.enabled:
        chosen.append(lambda view: code(view, settings.code))
    chosen += [OWN[name](options or {}) for name, options in settings.own.items()]
    return chosen


def length(view: View, settings: LengthConfig) -> str | None:
    """Too few or too many words."""
    if view.word_count < settings.min_words:
        return f"length: fewer than {settings.min_words:,} words"
    if settings.max_words is not None and view.word_count > settings.max_words:
        return f"length: more than {settings.max_words:,} words"
    return None


def gopher_quality(view: View, settings: GopherQualityConfig) -> str | None:
    """Rae et al. 2021, A1.1, "quality filtering"; not for source code."""
    if view.is_code:
        return None
    count = view.word_count
    if not settings.min_words <= count <= settings.max_words:
        return f"gopher quality: {'fewer' if count < settings.min_words else 'more'} words than allowed"
    if not (view.is_unspaced or view.is_hangul):
        mean = sum(map(len, view.words)) / count
        if not settings.min_mean_word_length <= mean <= settings.max_mean_word_length:
            return "gopher quality: mean word length"
    ellipses = sum(view.text.count(mark) for mark in _ELLIPSES)
    if max(view.text.count("#"), ellipses) > settings.max_symbols_per_word * count:
        return "gopher quality: symbols"
    lines = view.lines
    if sum(line.startswith(_BULLETS) for line in lines) > settings.max_bullet_lines * len(lines):
        return "gopher quality: bullet points"
    if sum(line.endswith(_ELLIPSES) for line in lines) > settings.max_ellipsis_lines * len(lines):
        return "gopher quality: lines that end with an ellipsis"
    if view.alphabetic_share < settings.min_alphabetic_words:
        return "gopher quality: words without letters"
    if _stop_words(view) < settings.min_stop_words:
        return "gopher quality: stop words"
    return None


def _stop_words(view: View) -> float:
    """Different stop words of the language; as many as are wanted where it has no list."""
    words = STOP_WORDS.get(view.language)
    if words is None:
        return float("inf")
    if view.language == "en":
        return len({word.lower() for word in view.words} & set(words))
    return sum(word in view.text for word in words)


def gopher_repetition(view: View, settings: GopherRepetitionConfig) -> str | None:
    """Rae et al. 2021, table A1. Of source code only whole lines are looked at: its n-grams repeat by nature."""
    lines, paragraphs = view.lines, view.paragraphs
    if not lines:
        return None
    count, characters = _duplicates(lines)
    if count > settings.max_duplicate_lines * len(lines):
        return "gopher repetition: duplicate lines"
    if characters > settings.max_duplicate_line_characters * sum(map(len, lines)):
        return "gopher repetition: characters in duplicate lines"
    count, characters = _duplicates(paragraphs)
    if count > settings.max_duplicate_paragraphs * len(paragraphs):
        return "gopher repetition: duplicate paragraphs"
    if characters > settings.max_duplicate_paragraph_characters * sum(map(len, paragraphs)):
        return "gopher repetition: characters in duplicate paragraphs"
    if view.is_code:
        return None
    for n, most in enumerate(settings.max_top_ngrams, start=2):
        if view.top_ngram_share(n) > most:
            return f"gopher repetition: the commonest {n}-gram"
    for n, most in enumerate(settings.max_duplicate_ngrams, start=5):
        if view.duplicate_ngram_share(n) > most:
            return f"gopher repetition: repeated {n}-grams"
    return None


def _duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """How many parts stood before, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        seen.add(part)
    return count, characters


def c4_lines(view: View, settings: C4Config) -> str:
    """The text without the lines that C4 takes out; source code stays as it is."""
    if view.is_code:
        return view.text
    return "\n".join(line for line in view.text.split("\n") if not line.strip() or _stays(view, line, settings))


def _stays(view: View, line: str, settings: C4Config) -> bool:
    lowered = line.lower()
    if "javascript" in lowered and len(view.text) > 2 * len(line) and "enable" in lowered:
        return False
    if any(phrase in lowered for phrase in _POLICY):
        return False
    if settings.require_terminal_punctuation and not line.rstrip().endswith(_TERMINAL):
        return False
    return view.count_words(line) >= settings.min_words_per_line


def c4(view: View, settings: C4Config) -> str | None:
    """Raffel et al. 2020, 2.2, on what `c4_lines` left; not for source code."""
    if view.is_code:
        return None
    if "lorem ipsum" in view.text.lower():
        return "c4: lorem ipsum"
    if "{" in view.text:
        return "c4: curly bracket"
    if len(_END.findall(view.text)) < settings.min_sentences:
        return "c4: too few sentences"
    return None


def fineweb(view: View, settings: FineWebConfig) -> str | None:
    """Penedo et al. 2024, 3.6; not for source code."""
    if view.is_code:
        return None
    lines = view.lines
    if not lines:
        return "fineweb: no line"
    if sum(line.endswith(_TERMINAL) for line in lines) < settings.min_punctuated_lines * len(lines):
        return "fineweb: lines without punctuation"
    width = _UNSPACED_WIDTH if view.is_unspaced else 1
    if sum(len(line) * width < settings.short_line_characters for line in lines) > settings.max_short_lines * len(
        lines
    ):
        return "fineweb: short lines"
    if _duplicates(lines)[1] > settings.max_duplicate_line_characters * sum(map(len, lines)):
        return "fineweb: characters in duplicate lines"
    if view.text.count("\n") > settings.max_newlines_per_word * view.word_count:
        return "fineweb: newlines"
    return None


def code(view: View, settings: CodeConfig) -> str | None:
    """Chen et al. 2021, 3.1: what is generated or data has long lines and few letters."""
    if not view.is_code:
        return None
    lines = view.text.split("\n")
    if max(map(len, lines)) > settings.max_line_characters:
        return "code: a very long line"
    if len(view.text) > settings.max_mean_line_characters * len(lines):
        return "code: long lines"
    if sum(map(str.isalnum, view.text)) < settings.min_alphanumeric * len(view.text):
        return "code: few letters and digits"
    return None
