"""The examples that `--help` shows, of every verb and every word of a verb."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from unittest import mock

from launcher import cli
from launcher.verbs import checkpoint
from tests.documented.commands import Command

_EXAMPLE = re.compile(r"^(?:examples?:)? *((?:bloomery|torchrun|srun) .*?)(?: {3,}.*)?$", re.MULTILINE)
_WORD = re.compile(r"^    ([a-z-]+)(?: |$)", re.MULTILINE)


def verbs() -> list[tuple[str, ...]]:
    """Every verb, and every word of those that have words."""
    words = {"checkpoint": tuple(checkpoint.WORDS), "data": tuple(_WORD.findall(help_of(("data",))))}
    return [called for verb in cli.VERBS for called in ([(verb, each) for each in words.get(verb, ())] or [(verb,)])]


def help_of(words: tuple[str, ...]) -> str:
    """What `bloomery WORDS --help` prints, its lines unbroken."""
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, {"COLUMNS": "400"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        cli.main([*words, "--help"])
    return printed.getvalue()


def examples() -> Iterator[Command]:
    """All of them, as they are typed."""
    for words in [("data",), *verbs()]:
        text = help_of(words)
        shown = text[text.find("example") :] if "example" in text else ""
        for number, found in enumerate(_EXAMPLE.finditer(shown), 1):
            yield Command(page=f"bloomery {' '.join(words)} --help", line=number, text=found.group(1).strip())
