"""The rules of the house that a machine can hold: import order, sizes, no hidden state.

Everything is read from the syntax tree, so that an import inside a function counts too. The ratchet: files and
functions have a limit, and the two lists of exceptions only get shorter; an exception that is no longer needed fails.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("data_pipeline", "launcher", "model", "parallel")
MAY_IMPORT = {
    "data_pipeline": ("parallel.common",),
    "launcher": ("data_pipeline", "model", "parallel"),
    "model": ("parallel",),
    "parallel": (),
}
FILE_LINES = 400
FUNCTION_LINES = 60
LONG_FILES: dict[str, str] = {}
"""Path: the reason why it may be longer."""
LONG_FUNCTIONS: dict[str, str] = {}
"""Path::name: the reason why it may be longer."""

FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(), str(path)) for path in FILES}


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported; `from a import b` gives `a.b`, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_rooms_import_only_what_they_may() -> None:
    wrong = [
        f"{_name(path)} imports {name}"
        for path, tree in TREES.items()
        for name in _imported(tree)
        for room in [path.relative_to(ROOT).parts[0]]
        if name.split(".")[0] in (*ROOMS, "tests", "benchmarks") and not _within(name, room)
        if not any(_within(name, allowed) for allowed in MAY_IMPORT[room])
    ]
    assert not wrong, "\n".join(wrong)


def test_the_common_leaf_imports_neither_torch_nor_a_room() -> None:
    wrong = [
        f"{_name(path)} imports {name}"
        for path, tree in TREES.items()
        if _name(path).startswith("parallel/common/")
        for name in _imported(tree)
        if _within(name, "torch") or (name.split(".")[0] in ROOMS and not _within(name, "parallel.common"))
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_stand_at_the_top_of_files() -> None:
    wrong = [
        f"{_name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for function in _functions(tree)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not wrong, "imports inside functions: " + ", ".join(wrong)
    by_name = [
        _name(path)
        for path, tree in TREES.items()
        if any(name in ("importlib", "importlib.import_module") for name in _imported(tree))
    ]
    allowed = ["launcher/cli.py", "launcher/doctor/probe.py", "launcher/plugins.py", "parallel/common/lazy.py"]
    assert by_name == allowed, "verbs, what the doctor tries, a user's plugins and slow libraries are imported by name"
    ours = [
        f"{_name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Lazy"
        if not isinstance(node.args[0], ast.Constant) or str(node.args[0].value).split(".")[0] in ROOMS
    ]
    assert not ours, "Lazy is for libraries, by a plain name: " + ", ".join(ours)


def test_no_hidden_state() -> None:
    wrong = [
        f"{_name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Global)
    ]
    assert not wrong, "`global` statements: " + ", ".join(wrong)


def test_parallel_state_is_used_in_the_topology_alone() -> None:
    wrong = [
        f"{_name(path)}:{node.lineno}"
        for path, tree in TREES.items()
        if _name(path) != "parallel/topology.py"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == "parallel_state")
        or (isinstance(node, ast.Attribute) and node.attr == "parallel_state")
        or (isinstance(node, ast.alias) and "parallel_state" in node.name.split("."))
    ]
    assert not wrong, "process groups are handed over, not looked up: " + ", ".join(wrong)


def test_files_are_short() -> None:
    long = {_name(path) for path in FILES if len(path.read_text().splitlines()) > FILE_LINES}
    assert long == set(LONG_FILES), f"files over {FILE_LINES} lines: {long ^ set(LONG_FILES)}"


def test_functions_are_short() -> None:
    long = {
        f"{_name(path)}::{function.name}"
        for path, tree in TREES.items()
        for function in _functions(tree)
        if function.end_lineno and function.end_lineno - function.lineno + 1 > FUNCTION_LINES
    }
    assert long == set(LONG_FUNCTIONS), f"functions over {FUNCTION_LINES} lines: {long ^ set(LONG_FUNCTIONS)}"


def test_room_packages_are_empty_and_tests_are_no_packages() -> None:
    wrong = [_name(path) for path in FILES if path.name == "__init__.py" and path.read_text().strip()]
    wrong += [_name(path) for path in (ROOT / "tests").rglob("__init__.py")]
    wrong += [_name(path.parent) for path in FILES if not (path.parent / "__init__.py").exists()]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_this_repository_s(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__file__ == str(ROOT / room / "__init__.py"), "something else shadows the room"


def test_configuration_imports_without_torch() -> None:
    configs = [_name(path)[:-3].replace("/", ".") for path in FILES if path.name == "config.py"]
    program = (
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {configs!r}: importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
