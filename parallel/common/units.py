"""Numbers for people: bytes, counts and durations, written and read.

Every number that a person sees goes through here, so that a table never mixes MB with MiB.
"""

import re

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_DECIMAL = ("", "K", "M", "B", "T")
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:[eE][+]?\d+)?)\s*([KMBT]?)", re.IGNORECASE)


def format_bytes(count: float) -> str:
    """`format_bytes(1536)` is `1.5 KiB`; three significant digits, powers of 1024."""
    value, unit = float(count), ""
    for unit in _BINARY:
        if abs(value) < 1000 or unit == _BINARY[-1]:
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"


def format_count(count: float) -> str:
    """`format_count(7_241_728)` is `7.24M`; three significant digits, powers of 1000."""
    value, unit = float(count), ""
    for unit in _DECIMAL:
        if abs(value) < 999.5 or unit == _DECIMAL[-1]:
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def format_duration(seconds: float) -> str:
    """`format_duration(3725)` is `1 h 2 min`; the two largest units that matter."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def parse_count(text: str | int) -> int:
    """Reads `100B`, `1.5M`, `3e9` or `5000` as a whole number.

    Raises:
        ValueError: the text is not a number with an optional K, M, B or T.
    """
    if isinstance(text, int):
        return text
    found = _COUNT.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a count: expected a number such as 5000, 1.5M or 100B")
    number, unit = found.groups()
    return round(float(number) * 1000 ** _DECIMAL.index(unit.upper()))
