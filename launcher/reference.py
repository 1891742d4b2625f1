"""The configuration reference: `docs/configuration.md`, made from the dataclasses and held to them by a test.

Idea: a field's meaning is the sentence that stands under it in the code, so the page has no text of its own and cannot
be wrong for long. `python -m launcher.reference` prints it (`make reference` writes it). Imports without torch.
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from launcher.config import RunConfig

_HEAD = """\
# Configuration: every key

Made from the code by `make reference`; a test fails where it is behind. One tree serves every verb: YAML files are
merged left to right, then `key=value` overrides (`optimizer.learning_rate=1e-3`). `bloomery train --print-config
CONFIG...` shows the whole tree of a run. A list is set whole; below, `[]` stands for each of its elements.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One key of the tree."""

    name: str
    """Dotted, from the root."""
    values: str
    default: str
    meaning: str


def page() -> str:
    """The whole page, in Markdown."""
    parts = [_HEAD]
    alone = [key for part in fields(RunConfig) for key in _keys_of(part, RunConfig, "") if not _is_section(part)]
    parts.append(_table(alone))
    for part in fields(RunConfig):
        if _is_section(part):
            parts += _section(get_type_hints(RunConfig)[part.name], part.name)
    return "\n".join(parts)


def all_keys() -> frozenset[str]:
    """Every key, dotted; elements of lists as `data.sources[].name`."""
    return frozenset(key.name for part in fields(RunConfig) for key in _deep(part, RunConfig, ""))


def _section(kind: Any, name: str) -> Iterator[str]:
    """A heading and a table for this dataclass, then those of the dataclasses in it."""
    yield f"## `{name}`\n\n{_paragraph(kind.__doc__)}\n"
    plain = [key for part in fields(kind) if not _below(part, kind) for key in _keys_of(part, kind, f"{name}.")]
    if plain:
        yield _table(plain)
    for part in fields(kind):
        below = _below(part, kind)
        if below is not None:
            yield from _section(below, f"{name}.{part.name}{'[]' if _is_list(part, kind) else ''}")


def _deep(part: Field[Any], kind: Any, prefix: str) -> Iterator[Key]:
    below = _below(part, kind)
    yield from _keys_of(part, kind, prefix)
    if below is not None:
        inside = f"{prefix}{part.name}{'[]' if _is_list(part, kind) else ''}."
        for each in fields(below):
            yield from _deep(each, below, inside)


def _keys_of(part: Field[Any], kind: Any, prefix: str) -> Iterator[Key]:
    hint = get_type_hints(kind)[part.name]
    said = [_meanings(kind).get(part.name, ""), *_choices(hint)]
    meaning = "<br>".join(text for text in said if text)
    yield Key(name=prefix + part.name, values=_values(hint), default=_default(part), meaning=meaning)


def _table(rows: list[Key]) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.values} | {row.default} | {row.meaning.replace('|', '\\|')} |" for row in rows]
    return "\n".join(lines) + "\n"


def _below(part: Field[Any], kind: Any) -> Any:
    """The dataclass that this field holds, alone, optional or in a list."""
    hint = get_type_hints(kind)[part.name]
    found = [each for each in (hint, *get_args(hint)) if is_dataclass(each)]
    return found[0] if found else None


def _is_section(part: Field[Any]) -> bool:
    return is_dataclass(get_type_hints(RunConfig)[part.name])


def _is_list(part: Field[Any], kind: Any) -> bool:
    return get_origin(get_type_hints(kind)[part.name]) is list


def _values(hint: Any) -> str:
    """A type in words that a user writes YAML by."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{str(value).lower()}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_values(each) for each in arguments if each is not NoneType)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return f"list of {_values(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} {_values(arguments[0])}"
    if origin is dict:
        return f"name: {_values(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{each.value}`" for each in hint)
    named = {int: "whole number", float: "number", str: "text", bool: "`true`, `false`", Any: "see right"}
    return named.get(hint, "keys below")


def _choices(hint: Any) -> Iterator[str]:
    """What the values of an enumeration mean, where it says so."""
    for each in (hint, *get_args(hint)):
        if isinstance(each, type) and issubclass(each, Enum):
            yield from (f"`{name}`: {text}" for name, text in _meanings(each).items())


def _default(part: Field[Any]) -> str:
    value = part.default_factory() if part.default_factory is not NO_DEFAULT else part.default
    if value == MISSING or value is NO_DEFAULT:
        return "**required**"
    if value is None:
        return "none"
    if isinstance(value, tuple | list | dict):
        shown = ", ".join(str(each) for each in value)
        return f"`{'{' if isinstance(value, dict) else '['}{shown}{'}' if isinstance(value, dict) else ']'}`"
    if isinstance(value, Enum):
        return f"`{value.value}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


@cache
def _meanings(kind: type) -> dict[str, str]:
    """The sentence under each field of a class, read from its source."""
    module = sys.modules[kind.__module__]
    found: dict[str, str] = {}
    for node in ast.walk(_tree(inspect.getsource(module))):
        if not (isinstance(node, ast.ClassDef) and node.name == kind.__name__):
            continue
        for statement, after in zip(node.body, node.body[1:], strict=False):
            name = _assigned(statement)
            if name and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[name] = _paragraph(str(after.value.value))
    return found


@cache
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


def _assigned(statement: ast.stmt) -> str | None:
    target = statement.target if isinstance(statement, ast.AnnAssign) else None
    if isinstance(statement, ast.Assign):
        target = statement.targets[0]
    return target.id if isinstance(target, ast.Name) else None


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    print(page(), end="")
