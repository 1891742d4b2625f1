"""Personal data in texts, replaced by what it was: `<EMAIL>`, `<IP>`, `<PHONE>`, `<NATIONAL_ID>`.

Expressions find candidates, and what can be checked is: addresses by `ipaddress`, Chinese identity numbers (GB 11643)
and IBANs (ISO 7064) by their check digits. A number without a check digit is masked only in a form that tells it, so
that prices, dates, versions and identifiers in source code stay.
"""

import ipaddress
import re
from collections.abc import Callable, Sequence

from data_pipeline.filters.config import Pii

# ASCII: a number right behind a Chinese character stands alone.
_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b", re.ASCII
)
_IP = re.compile(
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)|(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,6}(?![\w:]))",
    re.ASCII,
)
_PHONE = re.compile(
    r"(?<![\w+.-])(?:"
    r"\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}"
    r"|[2-9]\d{2}-[2-9]\d{2}-\d{4}"
    r"|(?:(?:\+|00)86[ -]?)?1[3-9]\d(?:\d{8}|[ -]\d{4}[ -]\d{4})"
    r")(?![\w-])",
    re.ASCII,
)
_NATIONAL = re.compile(
    r"(?<![\w-])(?:[1-9]\d{5}(?:19|20)\d{9}[\dXx]|(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}"
    r"|[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?)(?![\w-])",
    re.ASCII,
)
_CHINESE_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def mask(text: str, kinds: Sequence[Pii]) -> tuple[str, dict[str, int]]:
    """The text with personal data of some kinds replaced, and how often each was."""
    counts: dict[str, int] = {}
    for kind, (pattern, is_one) in _MASKS.items():
        if kind not in kinds:
            continue
        found = [match for match in pattern.finditer(text) if is_one(match[0])]
        for match in reversed(found):
            text = f"{text[: match.start()]}<{kind.value.upper()}>{text[match.end() :]}"
        if found:
            counts[kind.value] = len(found)
    return text, counts


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_national(number: str) -> bool:
    if number[0].isalpha():
        return _is_iban(number.replace(" ", ""))
    return "-" in number or _is_chinese(number)


def _is_chinese(number: str) -> bool:
    month, day = int(number[10:12]), int(number[12:14])
    total = sum(int(digit) * weight for digit, weight in zip(number, _CHINESE_WEIGHTS, strict=False))
    return 1 <= month <= 12 and 1 <= day <= 31 and "10X98765432"[total % 11] == number[17].upper()


def _is_iban(number: str) -> bool:
    digits = "".join(str(int(character, 36)) for character in number[4:] + number[:4])
    return 15 <= len(number) <= 34 and int(digits) % 97 == 1


def _always(_: str) -> bool:
    return True


_MASKS: dict[Pii, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    Pii.email: (_EMAIL, _always),
    Pii.national_id: (_NATIONAL, _is_national),
    Pii.ip: (_IP, _is_public),
    Pii.phone: (_PHONE, _always),
}
"""In the order in which they are looked for: a national number is not cut up as a phone number."""
