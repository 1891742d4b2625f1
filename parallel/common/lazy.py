"""Libraries that most commands do without: imported when something of them is first asked for.

    datasets = Lazy("datasets")      # nothing happens
    datasets.load_from_disk(path)    # now it is imported

Hugging Face `datasets` costs 0.8 s of processor time, Ray 0.5 s, trafilatura 0.25 s: `bloomery data` on jsonl files
would pay more for them than for a hundred megabytes of text. Of what is checked when a module is read (base classes,
annotations, `except`), nothing may be lazy.
"""

import importlib
from importlib.util import find_spec
from typing import Any


class Lazy:
    """Stands for a module."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def is_installed(self) -> bool:
        """Whether it could be imported; only looked up."""
        return find_spec(self._name) is not None

    def __getattr__(self, attribute: str) -> Any:
        """Of the module.

        Raises:
            ImportError: it is not installed.
        """
        return getattr(importlib.import_module(self._name), attribute)
