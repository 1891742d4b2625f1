"""What a person sees: a live line on a terminal, plain lines elsewhere, nothing from other ranks."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

from launcher import cli
from tests.launcher.tiny import configuration, ran

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(columns: int, *arguments: str) -> str:
    """What `bloomery ARGUMENTS` writes to a terminal of its own."""
    child, terminal = pty.fork()
    if child == 0:
        code = 1
        try:
            while os.get_terminal_size(1).columns != columns:  # until the parent has set it
                time.sleep(0.01)
            sys.stdout, sys.stderr = (os.fdopen(standard, "w", closefd=False) for standard in (1, 2))
            code = cli.main(arguments)
        finally:
            os._exit(code)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    content = b""
    try:
        while piece := os.read(terminal, 1 << 16):
            content += piece
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, content.decode()
    return content.decode()


@pytest.mark.parametrize("columns", [72, 120])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # any fork beside threads
def test_a_live_line_on_a_terminal(tmp_path: Path, store: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    written = on_a_terminal(columns, "train", str(configuration(tmp_path, store, train={"steps": 6})))
    shown = [line.strip() for line in re.split(r"[\r\n]+", _ESCAPES.sub("", written)) if line.strip()]
    bars = [line for line in shown if "\u2501" in line]
    assert re.fullmatch(r"\S+ 6/6 loss \d\.\d{3}  \S+ tokens/s  \S+ [KMG]iB  0\.0 s left", bars[-1]), bars[-1]
    assert max(map(len, bars)) <= columns
    assert shown[-1].startswith("finished: 6 steps")
    assert "step 1/6" not in written


@pytest.mark.distributed
def test_plain_lines_elsewhere_and_only_of_one_rank(tmp_path: Path, store: Path) -> None:
    said = ran("train", configuration(tmp_path, store, train={"steps": 3}), ranks=2)
    lines = [line for line in said.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert re.fullmatch(r"step 3/3  loss \d\.\d{3}  \S+ tokens/s  \S+ [KMG]iB  0\.0 s left", lines[-1]), lines[-1]
    assert said.count("finished: ") == 1
    assert "\x1b" not in said
