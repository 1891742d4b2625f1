"""Filters of plugins, by name: `data.stages.filters.own: {NAME: {options}}` applies them after all others."""

from collections.abc import Callable, Mapping
from typing import Any

from data_pipeline.filters.view import View

OWN: dict[str, Callable[[Mapping[str, Any]], Callable[[View], str | None]]] = {}


def register_filter(name: str, make: Callable[[Mapping[str, Any]], Callable[[View], str | None]]) -> None:
    """Makes a filter known.

    Args:
        name: the word in the configuration.
        make: from the options there, a rule: a function of a document that gives the reason why it goes, or None.

    Raises:
        ValueError: the name is taken.
    """
    if name in OWN:
        raise ValueError(f"there is a filter called {name} already")
    OWN[name] = make
