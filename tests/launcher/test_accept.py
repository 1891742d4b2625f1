"""The acceptance script itself: it fails on a model that learnt nothing, and names each file that is not whole."""

from pathlib import Path

import pytest

from tests.accept_quickstart import failures
from tests.launcher.tiny import configuration, ran


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """A run whose learning rate moves nothing, evaluated, with a sample and a report."""
    directory = tmp_path_factory.mktemp("untrained")
    config = configuration(directory, store, optimizer={"learning_rate": 1e-12})
    for arguments in (("train", config), *((verb, directory / "run") for verb in ("evaluate", "generate", "report"))):
        ran(*arguments)
    return directory / "run"


def test_an_untrained_model_is_refused_and_its_files_are_whole(untrained: Path) -> None:
    found = failures(str(untrained))
    assert any("expected at most 0.85" in failure for failure in found)
    kinds = {failure.split(":")[0] for failure in found}
    assert kinds <= {"learnt", "tracking", "pages", "store"}, found  # no tracking, no corpus report in this little run


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("metrics.jsonl", b"", "records: metrics.jsonl: no steps"),
        ("metrics.jsonl", b'{"step": 1}\n', "lacks loss"),
        ("history.jsonl", b"", "history.jsonl: no attempt"),
        ("outcome.json", b"{", "end: JSONDecodeError"),
        ("checkpoints/step-00000012/state.json", b"{}", "state.json is damaged"),
        ("lock", b"", "end: JSONDecodeError"),
        ("evaluation.json", b"{}", "learnt: KeyError"),
    ],
)
def test_what_is_not_whole_is_named(untrained: Path, name: str, change: bytes, told: str) -> None:
    before = (untrained / name).read_bytes()
    (untrained / name).write_bytes(change)
    try:
        assert any(told in failure for failure in failures(str(untrained)))
    finally:
        (untrained / name).write_bytes(before)
