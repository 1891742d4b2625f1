"""Copies in another place: whole or not there, and never in training's way."""

import logging
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import fsspec
import pytest

from launcher.verify.world import run_world
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.integrity import problems
from parallel.checkpoint.manifest import MANIFEST, Manifest, whole_steps
from parallel.checkpoint.mirror import Mirror
from parallel.checkpoint.retention import Retention
from tests.parallel.checkpoint_world import Counter, Weights, load, save

pytestmark = pytest.mark.distributed
LIMIT_SECONDS = 20


@pytest.fixture
def memory() -> Iterator[str]:
    """A place that is no directory."""
    url = f"memory://bucket-{uuid.uuid4().hex}/run"
    yield url
    fsspec.filesystem("memory").rm(url.removeprefix("memory:/").rpartition("/")[0], recursive=True)


def mirrored(root: Path, url: str) -> None:
    mirror = Mirror(root, url)
    mirror.push()
    mirror.wait(LIMIT_SECONDS)


def fetched(url: str, target: Path) -> Path:
    """What stands in a place, as files."""
    system: Any = cast(Any, fsspec.core.url_to_fs(url)[0])
    system.get(url.removeprefix("memory:/"), str(target), recursive=True)
    return target


def test_what_is_whole_here_is_whole_there(tmp_path: Path, memory: str) -> None:
    run_world(lambda: save(tmp_path / "here", steps=(1, 2)), 2)
    (tmp_path / "here/step-00000009").mkdir()
    mirrored(tmp_path / "here", memory)
    there = fetched(memory, tmp_path / "there")
    assert list(whole_steps(there)) == [1, 2]
    assert sorted(path.name for path in there.iterdir()) == ["step-00000001", "step-00000002"]
    for path in whole_steps(there).values():
        assert not list(problems(path, Manifest.read(path)))
    assert run_world(lambda: load(there), 1) == [2], "a copy is a checkpoint"


class _Recorder(Mirror):
    """Writes down what is asked of the place."""

    def __init__(self, root: Path, url: str) -> None:
        super().__init__(root, url)
        self.written: list[str] = []
        place, written = self._files, self.written

        class Place:
            def __getattr__(self, name: str) -> Any:
                if name in ("put_file", "pipe_file"):
                    return lambda *given: (written.append(given[name == "put_file"]), getattr(place, name)(*given))
                return getattr(place, name)

        self._files = Place()


def test_the_manifest_comes_last_and_nothing_is_copied_twice(tmp_path: Path, memory: str) -> None:
    run_world(lambda: save(tmp_path, steps=(1, 2)), 1)
    mirror = _Recorder(tmp_path, memory)
    mirror.push()
    mirror.wait(LIMIT_SECONDS)
    names = [name.partition("/step-")[2] for name in mirror.written]
    assert [name[:8] for name in names] == ["00000002"] * 4 + ["00000001"] * 4, "the newest first"
    assert [name[9:] for name in names].index(MANIFEST) == 3
    mirror.push()
    mirror.wait(LIMIT_SECONDS)
    assert len(mirror.written) == 8


def test_a_step_that_was_taken_again_replaces_its_copy(tmp_path: Path, memory: str) -> None:
    run_world(lambda: save(tmp_path / "here", steps=(1,)), 1)
    mirrored(tmp_path / "here", memory)
    shutil.rmtree(tmp_path / "here")
    run_world(lambda: save(tmp_path / "here", layout="rows", steps=(1,), attempt="again"), 1)
    mirrored(tmp_path / "here", memory)
    (path,) = whole_steps(fetched(memory, tmp_path / "there")).values()
    assert Manifest.read(path).attempt == "again"
    assert not list(problems(path, Manifest.read(path)))


def test_an_error_is_told_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_world(lambda: save(tmp_path / "here", steps=(1, 2)), 1)
    blocked = tmp_path / "there"
    blocked.write_text("in the way")
    with caplog.at_level(logging.WARNING):
        mirrored(tmp_path / "here", f"file://{blocked}")
    assert "cannot copy" in caplog.text
    assert "tried again at the next save" in caplog.text
    blocked.unlink()
    mirrored(tmp_path / "here", f"file://{blocked}")
    assert list(whole_steps(blocked)) == [1, 2]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_mirrors_what_it_saves_and_keeps_what_it_keeps(tmp_path: Path, asynchronous: bool) -> None:
    there = tmp_path / "there"

    def work() -> None:
        checkpoints = Checkpoints(
            tmp_path / "here",
            retention=Retention(newest=1),
            fence=Fence(attempt="a", holder=lambda: "a"),
            layout={},
            config={},
            asynchronous=asynchronous,
            mirror=str(there),
        )
        for step in (1, 2, 3):
            state = {"weights": Weights("rows", seed=step), "moments": Weights("rows", "moments", seed=-step)}
            checkpoints.save(step, {**state, "progress": Counter(step / 10)})
            checkpoints.finish(mirror=True)

    run_world(work, 1)
    assert list(whole_steps(tmp_path / "here")) == [3]
    assert list(whole_steps(there)) == [1, 2, 3]
    assert run_world(lambda: load(there, path=there / "step-00000002"), 2) == [2, 2]


def test_what_is_being_copied_is_not_to_be_removed(tmp_path: Path) -> None:
    run_world(lambda: save(tmp_path / "here", steps=(1,)), 1)
    mirror = Mirror(tmp_path / "here", str(tmp_path / "there"))
    with mirror.untouched() as copying:
        assert copying == ()
        mirror.push()  # its thread cannot begin a step inside the block
        shutil.rmtree(tmp_path / "here/step-00000001")
    mirror.wait(LIMIT_SECONDS)
    assert not (tmp_path / "there/step-00000001").exists()
