"""The commands that the documentation shows, with what it prints below them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TRANSLATIONS = sorted([*ROOT.glob("*.zh.md"), *(ROOT / "docs").glob("*.zh.md")])
"""Their commands are those of the page without `.zh`, which alone are run."""
PAGES = [
    page
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
    if page not in TRANSLATIONS and page.name != "CHANGELOG.md"
]
_PROGRAM = re.compile(r"(bloomery|make|python|torchrun|srun|sbatch) ")
_PARAGRAPH = re.compile(r"`((?:bloomery|make|python) [^`]+)`")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """One command as a shell takes it."""

    page: str
    line: int
    text: str
    """Without the remark behind it, in one line."""
    printed: tuple[str, ...] = ()
    """Lines that the page shows as its output."""


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page, in its order."""
    name = page.relative_to(ROOT).as_posix()
    for start, block in _blocks(page.read_text().splitlines()):
        yield from _of_a_block(name, start, block)


def _blocks(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines) of every indented or fenced block, and of every paragraph of one command."""
    fenced, block, start = False, list[str](), 0
    for number, line in enumerate([*lines, ""], 1):
        if line.startswith("```"):
            if fenced:
                yield start, block
            fenced, block, start = not fenced, [], number + 1
        elif fenced:
            block.append(line)
        elif line.startswith("    ") or (block and not line.strip() and number <= len(lines)):
            start = start if block else number
            block.append(line[4:])
        else:
            if block:
                yield start, block
            block = []
            if found := _PARAGRAPH.fullmatch(line.strip()):
                yield number, [found.group(1)]
    if block:
        yield start, block


def _of_a_block(page: str, start: int, block: list[str]) -> Iterator[Command]:
    """A block that begins with a command: it, the others in the block, and what they print."""
    if not block or not _PROGRAM.match(block[0]):
        return
    text, first, printed = "", start, list[str]()
    for number, line in enumerate(block, start):
        if text.endswith("\\"):
            text = text[:-1] + " " + line.strip()
        elif _PROGRAM.match(line):
            if text:
                yield Command(page=page, line=first, text=_bare(text), printed=tuple(printed))
            text, first, printed = line, number, []
        elif line.strip():
            printed.append(line)
    yield Command(page=page, line=first, text=_bare(text), printed=tuple(printed))


def _bare(text: str) -> str:
    """Without the remark, and with single spaces."""
    return re.sub(r" {2,}", " ", re.sub(r"\s+#\s.*", "", text)).strip()
