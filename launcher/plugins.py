"""Bring your own: modules of the user's that register families, optimizers, objectives, samples and filters.

A module is named in `plugins: [my_package.recipes]` of the configuration, or by an entry point of the group
`bloomery.plugins` of an installed package. It is imported when a configuration is loaded, in every process that reads
one, before anything is checked; what it registers is then a word like any other. docs/plugins.md has examples.

Their code is a part of the run's: `files` says where it stands, and launcher/changes.py hashes it.

It is one of three places that import by name: whose names they are, no import statement can say.
"""

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from parallel.common.errors import UserError

GROUP = "bloomery.plugins"


def load(names: Sequence[str]) -> None:
    """Imports the modules of the installed packages' entry points, then those named.

    Raises:
        UserError: one is not there, or fails; the sentence names it.
    """
    for point in _installed(tuple(sys.path)):
        _import(point.module, f"the entry point {point.name} of {point.dist.name if point.dist else 'a package'}")
    for name in names:
        _import(name, "plugins")


def files(names: Sequence[str]) -> dict[str, Path]:
    """{name to show: file} of the source of these modules and of the entry points', with all of their packages."""
    found: dict[str, Path] = {}
    for name in {*(point.module for point in _installed(tuple(sys.path))), *names}:
        module = sys.modules.get(name.partition(".")[0])
        own = getattr(module, "__file__", None)
        for root in map(Path, getattr(module, "__path__", [])):
            found |= {str(path.relative_to(root.parent)): path for path in root.rglob("*.py")}
        if own is not None:
            found.setdefault(Path(own).name, Path(own))
    return found


@cache
def _installed(_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Those of the packages on Python's path; reading the facts of all takes 0.1 s."""
    return tuple(entry_points(group=GROUP))


@cache
def _import(name: str, origin: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{origin}: the module {name} cannot be imported: {error}.") from error
        hint = "a module that Python finds (an installed package, or a directory in PYTHONPATH)"
        raise UserError(f"{origin}: there is no module {name}: expected {hint}.") from error
    except Exception as error:
        raise UserError(f"{origin}: the module {name} cannot be imported: {type(error).__name__}: {error}.") from error
