"""A disk that really runs full, again and again a little later: a sentence each time, and in the end the same bytes."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import build as building
from data_pipeline import select as selecting
from data_pipeline import stages
from data_pipeline.build import build
from data_pipeline.config import DataConfig, GrowConfig, IndexKind, SourceConfig, StagesConfig
from data_pipeline.growth.job import grow
from data_pipeline.select import select
from parallel.common.errors import UserError
from tests.data_pipeline import test_build, test_grow

STEP_KIB = 96
MOST_STEPS = 60


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many KiB, or resizes it. Another program fills it: space that was asked for is gone later."""
    place = tmp_path / "disk"
    place.mkdir()
    first = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={STEP_KIB}k", "none", str(place)], capture_output=True, check=False
    )
    if first.returncode:
        pytest.skip("only who may mount can make a small disk")
    for module in (stages, building):
        monkeypatch.setattr(module, "require_space", lambda *_: None)

    def sized(kib: int) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(place)], check=True)
        return place

    yield sized
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def until_it_fits(disk: Callable[[int], Path], work: Callable[[Path], Any]) -> list[str]:
    """Tries on a disk that grows a little each time; what was said on the way."""
    said: list[str] = []
    for step in range(1, MOST_STEPS):
        try:
            work(disk(step * STEP_KIB) / "store")
        except UserError as error:
            said.append(str(error))
        else:
            return said
    raise AssertionError(f"not even {MOST_STEPS * STEP_KIB} KiB were enough: {said[-1]}")


def assert_plain(said: list[str]) -> None:
    assert len(said) > 2
    for sentence in said:
        assert "\n" not in sentence
        assert "full" in sentence or "no space left" in sentence or "make room" in sentence


def test_a_build_goes_on_when_there_is_room(tmp_path: Path, disk: Callable[[int], Path]) -> None:
    corpus = test_build.write_corpus(tmp_path / "corpus", documents=400)
    build(test_build.config_of(corpus, tmp_path / "whole"))
    assert_plain(until_it_fits(disk, lambda store: build(test_build.config_of(corpus, store))))
    assert test_build.content_of(tmp_path / "disk" / "store") == test_build.content_of(tmp_path / "whole")


@pytest.mark.parametrize("index", list(IndexKind))
def test_a_growing_store_goes_on_when_there_is_room(
    tmp_path: Path, disk: Callable[[int], Path], index: IndexKind
) -> None:
    corpus = test_build.write_corpus(tmp_path / "corpus", documents=150)
    test_grow.small_tokenizer().save(corpus / "tokenizer.json")
    settings = GrowConfig(portion_bytes=20_000, index=index, bloom_documents=2000)

    def config(store: Path) -> DataConfig:
        return test_grow.config_of(corpus, store, grow=settings)

    grow(config(tmp_path / "whole"))
    assert_plain(until_it_fits(disk, lambda store: grow(config(store))))
    assert test_grow.content_of(tmp_path / "disk" / "store") == test_grow.content_of(tmp_path / "whole")


def test_deduplication_alone_leaves_nothing_half_written(tmp_path: Path, disk: Callable[[int], Path]) -> None:
    corpus = test_build.write_corpus(tmp_path / "corpus", documents=400)
    sources = [SourceConfig(name="web", path=str(corpus / "web.jsonl.gz"))]
    settings = replace(StagesConfig(), max_dropped_share=1.0)
    select(sources, tmp_path / "whole", settings)
    assert_plain(until_it_fits(disk, lambda output: select(sources, output, settings)))
    assert test_build.content_of(tmp_path / "disk" / "store") == test_build.content_of(tmp_path / "whole")
    assert not (tmp_path / "disk" / "store" / selecting.WORK).exists()
