"""The quickstart script: public commands only, that parse, on the installed text or on the user's own."""

from pathlib import Path

import pytest

from launcher import quickstart
from launcher.cli import VERBS
from launcher.config import RunConfig, load
from launcher.verbs.train import split
from parallel.common.errors import UserError


def configured(text: quickstart.Text) -> RunConfig:
    """What `bloomery data build` reads."""
    command = quickstart.commands(quickstart.ROOT / quickstart.CONFIG, text)[0]
    return load(*split(command.arguments[2:]))


def test_the_installed_text_is_two_trees() -> None:
    data = configured(quickstart.installed_text()).data
    assert [source.name for source in data.sources] == ["code", "prose"]
    assert set(data.mixture) == {"code", "prose"}
    for source in data.sources:
        assert len(source.paths) == 2
        assert all(Path(path).is_dir() for path in source.paths)


@pytest.mark.parametrize("name", ["poems.jsonl.gz", "a file, [with] 'quotes' & = spaces.txt", "中文.parquet", "...txt"])
def test_own_text_is_the_only_source_of_a_store_and_a_run_of_its_own(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    text = quickstart.own_text(tmp_path / name)
    config = configured(text)
    (source,) = config.data.sources
    assert list(source.paths) == [str(tmp_path / name)]
    assert config.run.name == text.name
    assert config.data.store == f"stores/{text.name}"
    assert config.data.mixture == {}
    assert text.name.isascii()


def test_files_of_the_same_name_do_not_share_a_run(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "text.txt").touch()
    first, second = (quickstart.own_text(tmp_path / directory / "text.txt").name for directory in ("a", "b"))
    assert first != second


def test_only_public_commands_are_run() -> None:
    commands = quickstart.commands(Path(quickstart.CONFIG), quickstart.installed_text())
    assert [command.arguments[0] for command in commands] == ["data", "train", "evaluate", "generate", "report"]
    assert all(command.arguments[0] in VERBS for command in commands)


def test_too_little_text_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "little.jsonl").write_text('{"text": "the smith heats the ore until the slag runs"}\n' * 3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"1 different documents are too few|no training document"):
        quickstart.main(["--data", "little.jsonl"])


def test_the_first_command_that_fails_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert quickstart.main(["--data", "empty.txt"]) == 2
    assert "2. Training" not in capsys.readouterr().out
