"""What the documentation names exists: files, links, keys of the configuration, verbs and their options.

The pages are read as text; `make docs-test` (tests/accept_docs.py) runs their commands.
"""

import re
import shlex
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import cli, reference
from tests.accept_docs import idle_rows, shown
from tests.documented.commands import PAGES, ROOT, TRANSLATIONS, Command, commands
from tests.documented.examples import examples, verbs

_SECTIONS = {key.split(".")[0] for key in reference.all_keys() if "." in key}
_TOP = "docs|configs|tests|benchmarks|slurm|launcher|model|parallel|data_pipeline"
_FILES = re.compile(rf"(?<![\w./~-])((?:{_TOP})/[\w./-]+)")
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
_KEY = re.compile(rf"(?<![\w./-])((?:{'|'.join(sorted(_SECTIONS))})(?:\.[a-z_]+)+)(?![\w/*])")
_COMMAND = re.compile(r"(?:^ *|`|\$ |&& )(?:bloomery|\S*python\S* (?:-P )?-m launcher) +([a-z][^`#\n]*)", re.MULTILINE)


def _each(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _where(command: Command) -> str:
    return f"{command.page}:{command.line}"


@pytest.mark.parametrize("page", [*PAGES, *TRANSLATIONS], ids=_each)
def test_files_and_links_exist(page: Path) -> None:
    text = page.read_text()
    named = {ROOT / name.rstrip(".") for name in _FILES.findall(text)}
    named |= {page.parent / link for link in _LINK.findall(text) if "://" not in link}
    assert not [str(path) for path in sorted(named) if not path.exists() and not _made_by_running(path)]


def _made_by_running(path: Path) -> bool:
    return any(part in ("runs", "stores") for part in path.parts)


@pytest.mark.parametrize("page", [*PAGES, *TRANSLATIONS], ids=_each)
def test_keys_exist(page: Path) -> None:
    known = reference.all_keys()
    named = {key for key in _KEY.findall(_ours(page)) if not key.endswith((".py", ".yaml", ".md"))}
    named = {key for key in named if not (ROOT / key.split(".")[0] / f"{key.split('.')[-1]}.py").exists()}
    wrong = {key for key in named if key not in known and not _inside_a_list(key, known) and not _attribute(key)}
    assert not sorted(wrong)


@pytest.mark.parametrize("page", [*PAGES, *TRANSLATIONS], ids=_each)
def test_keys_of_yaml_blocks_exist(page: Path) -> None:
    known = reference.all_keys()
    named = {key for block in _yaml_blocks(page.read_text()) for key in _flat(block)}
    assert not sorted(key for key in named if key not in known and not _inside_a_list(key, known))


def _yaml_blocks(text: str) -> Iterator[dict[str, Any]]:
    """Indented and fenced blocks that are a part of a configuration: every word at their left edge is a section."""
    fenced = re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    for block in [*fenced, *map(textwrap.dedent, indented)]:
        try:
            read = yaml.safe_load(block)
        except yaml.YAMLError:
            continue
        if isinstance(read, dict) and set(read) <= _SECTIONS:
            yield read


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys; a mapping whose keys are the user's own names (weights by source) is one value."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and any(each.startswith(f"{name}.") for each in reference.all_keys()):
            yield from _flat(value, f"{name}.")
        else:
            yield name
        for each in value if isinstance(value, list) else []:
            if isinstance(each, dict):
                yield from _flat(each, f"{name}[].")


def _ours(page: Path) -> str:
    """A page without what it quotes of other projects: the first column of docs/coming-from.md."""
    text = page.read_text()
    return re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE) if page.name == "coming-from.md" else text


def _inside_a_list(key: str, known: frozenset[str]) -> bool:
    return any(key.startswith(each.partition("[]")[0] + ".") for each in known if "[]" in each)


def _attribute(key: str) -> bool:
    """Something of Python's, such as `model.language_model.Stage` or a module of a room."""
    return (ROOT / Path(*key.split("."))).with_suffix(".py").exists() or (ROOT / Path(*key.split("."))).is_dir()


@pytest.mark.parametrize("page", [*PAGES, *TRANSLATIONS], ids=_each)
def test_verbs_and_options_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for command in _COMMAND.findall(page.read_text()):
        words = command.split()
        help_text = _help(tuple(words[:2]), capsys) or _help(tuple(words[:1]), capsys)
        if help_text is None:
            wrong.append(f"bloomery {command}: no such verb")
            continue
        options = {word.partition("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z-]+(=.*)?", word)}
        wrong += [f"bloomery {command}: no {option}" for option in options if not _has(help_text, option)]
    assert not wrong, "\n".join(wrong)


def _has(help_text: str, option: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_text) is not None


@cache
def _words_with_help(verb: str) -> bool:
    return verb in ("data", "checkpoint")


def _help(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str | None:
    """What `bloomery WORDS --help` prints, or None where there is no such verb."""
    if not words or words[0] not in cli.VERBS or (len(words) > 1 and not _words_with_help(words[0])):
        return None
    code: object = 0
    try:
        code = cli.main([*words, "--help"])
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr().out
    return printed if code in (0, None) else None


def test_what_is_said_of_commands_that_do_not_run_here_fits_some() -> None:
    assert not idle_rows(shown())


def test_help_of_every_verb_and_word_has_an_example_of_it() -> None:
    found = [each.text for each in examples()]
    assert not [words for words in verbs() if not any(text.startswith(f"bloomery {' '.join(words)}") for text in found)]
    named = {ROOT / name for text in found for name in _FILES.findall(text)}
    assert not [str(path) for path in sorted(named) if not path.exists()]


@pytest.mark.parametrize("page", TRANSLATIONS, ids=_each)
def test_a_translation_shows_the_same_commands(page: Path) -> None:
    original = page.with_name(page.name.replace(".zh", ""))
    assert [each.text for each in commands(page)] == [each.text for each in commands(original)]


@pytest.mark.parametrize("command", [each for page in PAGES for each in commands(page) if each.printed], ids=_where)
def test_what_arithmetic_prints_is_what_the_page_shows(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command.text)
    if words[:2] != ["bloomery", "plan"]:
        pytest.skip("no arithmetic alone: `make docs-test` runs it")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(ROOT)
        here.setenv("COLUMNS", "200")
        assert cli.main(words[1:]) == 0
    printed = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert not [line for line in command.printed if " ".join(line.split()) not in printed]


def test_the_reference_is_what_the_code_says() -> None:
    page = ROOT / "docs" / "configuration.md"
    assert page.read_text() == reference.page(), "run `make reference`"


def test_every_verb_is_in_the_readme_or_a_page_of_docs() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert not [verb for verb in cli.VERBS if not re.search(rf"(bloomery|make) {verb}\b", text)]
