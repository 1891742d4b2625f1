"""A list of layouts to prove: a YAML list of rows, each merged over the configuration.

    - {name: tensor-data, ranks: 4, set: {parallel.tensor: 2, model.tie_embeddings: true}}

`ranks` may be left out (two data-parallel ranks, as without a list); `model` names a YAML file beside the list that is
merged before `set`; `ci: true` marks the rows that continuous integration proves each time. Imports without torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher import config as configuration
from launcher.config import RunConfig
from launcher.verify.shrink import Shrunk, complete, shrink
from parallel.common.errors import ConfigError, Problem, UserError

_KEYS = ("name", "ranks", "model", "set", "ci")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A layout to prove."""

    name: str
    config: RunConfig
    """Complete."""
    ranks: int
    proofs: tuple[Shrunk, ...]
    """What proves it; the first has all its dimensions."""


def row(name: str, files: Sequence[str], overrides: Sequence[str], ranks: int | None) -> Row:
    """One layout from a configuration as a user writes it.

    Raises:
        UserError: a file, key or value is wrong.
        ConfigError: the layout is illegal; all problems.
    """
    config, ranks = complete(configuration.load(files, overrides), ranks)
    return Row(name=name, config=config, ranks=ranks, proofs=tuple(shrink(config, ranks)))


def read_rows(path: Path, files: Sequence[str], overrides: Sequence[str], *, only_ci: bool = False) -> list[Row]:
    """All rows of a list.

    Raises:
        UserError: the file is not such a list.
        ConfigError: layouts are illegal; the problems of all rows, each with its row's name.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for entry in _entries(path):
        if only_ci and not entry.get("ci"):
            continue
        name = entry["name"]
        own = [f"{key}={json.dumps(value)}" for key, value in entry.get("set", {}).items()]
        try:
            model = [str(path.parent / entry["model"])] if "model" in entry else []
            rows.append(row(name, [*files, *model], [*overrides, *own], entry.get("ranks")))
        except ConfigError as error:
            problems.extend(
                Problem(key=f"row {name}: {each.key}", got=each.got, legal=each.legal) for each in error.problems
            )
        except UserError as error:
            raise UserError(f"row {name} of {path}: {error}") from error
    if problems:
        raise ConfigError(problems)
    return rows


def _entries(path: Path) -> list[dict[str, Any]]:
    expected = "expected a YAML list of rows such as {name: tensor, ranks: 2, set: {parallel.tensor: 2}}"
    try:
        entries = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {expected}.") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): {expected}.") from error
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds no rows: {expected}.")
    names: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise UserError(f"row {number} of {path} has no name: {expected}.")
        unknown = sorted(set(entry) - set(_KEYS))
        if unknown:
            raise UserError(f"row {entry['name']} of {path} has {unknown[0]!r}: expected {', '.join(_KEYS)}.")
        ranks, values = entry.get("ranks"), entry.get("set", {})
        if ranks is not None and (not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1):
            raise UserError(f"row {entry['name']} of {path} has ranks: {ranks!r}; expected a whole number above 0.")
        if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
            raise UserError(f"row {entry['name']} of {path} has a wrong `set`: {expected}.")
        if not isinstance(entry.get("model", ""), str):
            raise UserError(f"row {entry['name']} of {path} has model: {entry['model']!r}; expected a path beside it.")
        if entry["name"] in names:
            raise UserError(f"two rows of {path} are called {entry['name']}: expected a name for each.")
        names.add(entry["name"])
    return entries
