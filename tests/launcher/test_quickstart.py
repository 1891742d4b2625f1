"""The quickstart script: public commands only, that parse, on the installed text or on the user's own."""

from pathlib import Path

import pytest

from launcher import quickstart
from launcher.cli import VERBS
from launcher.config import load
from launcher.verbs.train import split


def configured(overrides: list[str]) -> list[str]:
    """What stands behind `bloomery train`."""
    return [str(quickstart.ROOT / quickstart.CONFIG), *overrides]


def test_the_installed_text_is_two_trees() -> None:
    files, overrides = split(configured(quickstart.installed_text()))
    data = load(files, overrides).data
    assert [source.name for source in data.sources] == ["code", "prose"]
    assert set(data.mixture) == {"code", "prose"}
    for source in data.sources:
        assert len(source.paths) == 2
        assert all(Path(path).is_dir() for path in source.paths)


@pytest.mark.parametrize("name", ["poems.jsonl.gz", "a file, [with] 'quotes' & = spaces.txt", "中文.parquet", "...txt"])
def test_own_text_is_the_only_source_of_a_store_and_a_run_of_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    run, overrides = quickstart.own_text(tmp_path / name)
    files, overrides = split(configured(overrides))
    config = load(files, overrides)
    (source,) = config.data.sources
    assert source.paths == (str(tmp_path / name),) or source.paths == [str(tmp_path / name)]
    assert config.run.name == run
    assert config.data.store == f"stores/{run}"
    assert config.data.mixture == {}
    assert run.isascii()


def test_files_of_the_same_name_do_not_share_a_run(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "text.txt").touch()
    first, second = (quickstart.own_text(tmp_path / directory / "text.txt")[0] for directory in ("a", "b"))
    assert first != second


def test_only_public_commands_are_run() -> None:
    commands = quickstart.commands(Path(quickstart.CONFIG), "quickstart", ["run.name=x"], prompts=["import os"])
    assert [command.arguments[0] for command in commands] == ["data", "train", "evaluate", "generate", "report"]
    assert all(command.arguments[0] in VERBS for command in commands)


def test_the_first_command_that_fails_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert quickstart.main(["--data", "empty.txt"]) == 2
    assert "2. Training" not in capsys.readouterr().out
