"""Which language a text is written in, offline: the script where it tells, else py3langid (extra `filters`).

py3langid ships its model (97 languages) in the package. It looks at the first thousand characters: 2,000 documents a
second on one core. Chinese, Japanese and Korean are told by their characters, which is surer and free.
"""

from functools import cache
from typing import Any

from data_pipeline.filters.view import View
from parallel.common.errors import UserError

try:
    from py3langid import langid
except ImportError:  # Without it nothing but Chinese, Japanese and Korean is told apart, so asking for it is refused.
    langid = None

_LOOKED_AT = 1000
_MACRO = {"yue": "zh", "wuu": "zh", "nb": "no", "nn": "no"}


@cache
def _identifier() -> Any:
    if langid is None:
        raise UserError("data.stages.filters.language needs py3langid: install it with `pip install bloomery[filters]`")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def identify(view: View) -> tuple[str, float]:
    """Code of the language (ISO 639-1 where it has one) and how certain that is, 0 to 1.

    Raises:
        UserError: py3langid is not installed.
    """
    identifier = _identifier()
    if view.is_unspaced or view.is_hangul:
        return view.language_of_script, 1.0
    code, certainty = identifier.classify(view.text[:_LOOKED_AT])
    return _MACRO.get(str(code), str(code)), float(certainty)
