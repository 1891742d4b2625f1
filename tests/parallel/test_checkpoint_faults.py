"""Checkpoints under attack: kills at every point of a save, failing writes, damage, and code in the files."""

import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.verify.world import RankDied, run_world
from parallel.checkpoint.manifest import FileRecord, Manifest, whole_steps
from parallel.common.errors import UserError
from parallel.common.files import hash_file
from tests.parallel.checkpoint_world import load, save, saved, with_fault

pytestmark = pytest.mark.distributed

FILES = ["manifest.json", "state.json", "tensors/.metadata", "tensors/__0_0.distcp", "tensors/__1_0.distcp"]


POINTS = [
    ("shard_half_written", 0, 1),
    ("shard_half_written", 1, 1),
    ("shard_half_written:9", 1, 1),
    ("before_manifest", 0, 1),
    ("after_manifest", 0, 1),
    ("before_rename", 0, 1),
    ("after_rename", 0, 2),
    ("retention", 0, 2),
]


@pytest.mark.parametrize(
    ("point", "rank", "newest", "asynchronous"),
    [(*point, False) for point in POINTS] + [(*POINTS[number], True) for number in (1, 5, 6)],
)
@pytest.mark.fault(
    number=1,
    fault="SIGKILL of one rank in the middle of a shard",
    holds="the checkpoint before loads bit for bit, the half one is never listed",
    back_after=0.4,
)
@pytest.mark.fault(
    number=2,
    fault="SIGKILL of rank 0 before and after the manifest, before and after the rename, in both kinds of save",
    holds="the old checkpoint or the new one loads, never a mixture",
    back_after=0.4,
)
@pytest.mark.fault(
    number=20,
    fault="SIGKILL while an old checkpoint is being removed",
    holds="what stays is whole, the half-removed one is not listed and goes with the next attempt",
    back_after=0.4,
)
def test_a_kill_leaves_the_old_or_the_new_and_never_a_mixture(
    tmp_path: Path, point: str, rank: int, newest: int, asynchronous: bool
) -> None:
    saved(tmp_path, 2)
    faulty = (f"checkpoint.{point}", rank, save, tmp_path, "tensor", (2,), 1, "killed", asynchronous)
    with pytest.raises(RankDied) as caught:
        run_world(with_fault, 2, *faulty)
    assert caught.value.ranks == {rank: -signal.SIGKILL}
    assert run_world(lambda: load(tmp_path), 2) == [newest, newest]
    run_world(lambda: save(tmp_path, steps=(3,), keep=2, attempt="next"), 2)
    assert run_world(lambda: load(tmp_path), 1) == [3]
    assert list(whole_steps(tmp_path)) == [newest, 3]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [f"step-{newest:08d}", "step-00000003"]


def test_a_write_that_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    saved(tmp_path, 2)

    def save_beyond_the_limit() -> str:
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.raises(UserError) as caught:
            save(tmp_path, steps=(2,))
        return str(caught.value)

    messages = run_world(save_beyond_the_limit, 2)
    assert set(messages) == {f"cannot save the checkpoint {tmp_path}/step-00000002 on rank 1: File too large"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    assert run_world(lambda: load(tmp_path), 2) == [1, 1]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("in the way")
    with pytest.raises(UserError, match=r"cannot save the checkpoint .*/file/step-00000001: File exists \(.*/file\)"):
        run_world(lambda: save(root), 2)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _zero_a_page(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes(min(4096, len(content))) + content[4096:])


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def _fill_with_garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def _link_elsewhere(path: Path) -> None:
    moved = path.parent.parent.parent / "moved"
    path.rename(moved)
    path.symlink_to(moved)


@pytest.mark.parametrize(
    "damage", [_flip_a_bit, _zero_a_page, _truncate, _fill_with_garbage, Path.unlink, _link_elsewhere]
)
@pytest.mark.fault(
    number=18,
    fault="a flipped bit, a zeroed page, a truncation, garbage, a missing file, a link, in every kind of file",
    holds="refused by the file's name on every rank",
    back_after="refused, until the file is mended",
)
def test_damage_in_any_file_is_refused_by_its_name(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    whole = saved(tmp_path / "whole", 2)
    damaged = {name: tmp_path / str(number) / whole.name for number, name in enumerate(FILES)}
    for name, path in damaged.items():
        damage(shutil.copytree(whole, path) / name)

    def refused() -> list[str]:
        said = []
        for path in damaged.values():
            with pytest.raises(UserError) as caught:
                load(path.parent, path=path)
            said.append(str(caught.value))
        return said

    for said in run_world(refused, 2):
        assert all(Path(name).name in each for name, each in zip(damaged, said, strict=True)), said


def test_a_file_too_many_is_refused_by_its_name(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    (path / "tensors/common.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"tensors/common\.pt is unexpected"):
        run_world(lambda: load(tmp_path), 2)


@pytest.mark.fault(
    number=18,
    fault="shards of another step",
    holds="refused by the file's name",
    back_after="refused, until the file is mended",
)
def test_swapped_shards_and_those_of_another_step_are_refused(tmp_path: Path) -> None:
    run_world(lambda: save(tmp_path, steps=(1, 2)), 2)
    first, second = (tmp_path / f"step-0000000{step}" for step in (1, 2))
    name = "tensors/.metadata"
    assert (first / name).read_bytes() == (second / name).read_bytes(), "it says nothing of contents"
    for name in ("state.json", "tensors/__0_0.distcp", "tensors/__1_0.distcp"):
        kept = (second / name).read_bytes()
        (second / name).write_bytes((first / name).read_bytes())
        with pytest.raises(UserError, match=Path(name).name):
            run_world(lambda: load(tmp_path), 1)
        (second / name).write_bytes(kept)
    assert run_world(lambda: load(tmp_path), 1) == [2]
    first.rename(tmp_path / "step-00000009")
    with pytest.raises(UserError, match="belongs to step-00000001"):
        run_world(lambda: load(tmp_path, path=tmp_path / "step-00000009"), 1)


def test_a_step_with_a_damaged_manifest_is_passed_over_and_kept_when_saved_again(tmp_path: Path) -> None:
    run_world(lambda: save(tmp_path, steps=(1, 2)), 1)
    _truncate(tmp_path / "step-00000002/manifest.json")
    assert list(whole_steps(tmp_path)) == [1]
    run_world(lambda: save(tmp_path, steps=(2,), attempt="next"), 1)
    assert run_world(lambda: load(tmp_path), 1) == [2]
    assert (tmp_path / ".damaged-step-00000002-before-next/state.json").exists()


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.fault(
    number=29,
    fault="a pickle that runs code, in every file of a checkpoint, its manifest forged to match",
    holds="no code runs, the file is refused by its name",
    back_after="refused",
)
def test_code_in_a_file_is_not_run(tmp_path: Path, name: str, plain: bool) -> None:
    """Even where the manifest was forged to match; plain pickle, and inside torch's own file format."""
    path = saved(tmp_path, 2)
    target = tmp_path / "the payload ran"
    if plain:
        (path / name).write_bytes(pickle.dumps(_Payload(target)))
    else:
        with (path / name).open("wb") as file:
            torch.save(_Payload(target), file)
    if name != "manifest.json":
        _forge_manifest(path, name)
    with pytest.raises(UserError) as caught:
        run_world(lambda: load(tmp_path, path=path), 1)
    assert Path(name).name in str(caught.value)
    assert not target.exists()
    if plain:
        pickle.loads(pickle.dumps(_Payload(target)))
        assert target.exists(), "the payload would have worked"


@pytest.mark.fault(
    number=29,
    fault="tensor metadata that names a file outside the checkpoint",
    holds="refused by the name it gives",
    back_after="refused",
)
def test_metadata_that_points_outside_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    metadata = pickle.loads((path / "tensors/.metadata").read_bytes())
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, relative_path="../../outside")
    (path / "tensors/.metadata").write_bytes(pickle.dumps(metadata))
    _forge_manifest(path, "tensors/.metadata")
    with pytest.raises(UserError, match=r"'\.\./\.\./outside' is not a file of this checkpoint"):
        run_world(lambda: load(tmp_path), 1)


def _forge_manifest(path: Path, name: str) -> None:
    """Makes the manifest agree with a file that was changed."""
    manifest = Manifest.read(path)
    record = FileRecord(bytes=(path / name).stat().st_size, hash=hash_file(path / name))
    replace(manifest, files={**manifest.files, name: record}).write(path)
