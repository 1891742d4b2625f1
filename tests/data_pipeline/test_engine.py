"""The engines give the same bytes: threads, two Ray nodes, and (`make soak`) one, and stores that grow."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline import read
from data_pipeline.build import build
from data_pipeline.config import (
    DecontaminateConfig,
    Engine,
    NearDedupConfig,
    StagesConfig,
)
from data_pipeline.engine import open_engine
from data_pipeline.filters.config import FiltersConfig, GopherRepetitionConfig, Pii
from data_pipeline.growth.job import grow
from parallel.common.errors import UserError
from tests.data_pipeline.test_build import config_of, content_of, write_corpus
from tests.data_pipeline.test_grow import content_of as grown_content_of

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
cluster_utils = pytest.importorskip("ray.cluster_utils")
pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def cluster(nodes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray cluster of so many nodes of one core on this machine."""
    made = cluster_utils.Cluster()
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1, object_store_memory=100 << 20, include_dashboard=False)
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        yield
    finally:
        made.shutdown()


def fail(number: int) -> int:
    if number == 2:
        raise UserError("this batch is damaged")
    return number


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "grows"),
    [(2, False), pytest.param(2, True, marks=pytest.mark.long), pytest.param(1, True, marks=pytest.mark.long)],
)
def test_a_ray_cluster_gives_the_bytes_of_native(
    nodes: int, grows: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=40)
    (tmp_path / "bench.txt").write_text(
        "iron1 ore2 furnace3 slag4 coal5 air6 bloom7 hammer8 anvil9 iron1 ore2 slag3 coal4\n"
    )
    stages = StagesConfig(
        filters=FiltersConfig(gopher_repetition=GopherRepetitionConfig(enabled=True), mask=(Pii.email,)),
        decontaminate=DecontaminateConfig(files=(str(tmp_path / "bench.txt"),)),
        near_dedup=NearDedupConfig(),
    )
    monkeypatch.setattr(read, "BATCH_BYTES", 10_000)

    def written(name: str, engine: Engine) -> tuple[dict[str, str], dict[str, str]]:
        """What a store holds that is built, and one that grows."""
        config = replace(config_of(corpus, tmp_path / name, stages=stages), engine=engine)
        growing = replace(
            config, store=str(tmp_path / f"{name}-grown"), grow=replace(config.grow, portion_bytes=30_000)
        )
        build(config)
        if grows:
            grow(growing)
        return content_of(tmp_path / name), grown_content_of(tmp_path / f"{name}-grown")

    with cluster(nodes, monkeypatch):
        found = written("ray", Engine.ray)
        with open_engine(Engine.ray) as mapper:
            assert list(mapper(abs, range(-40, 0))) == list(range(40, 0, -1))
            with pytest.raises(UserError, match="this batch is damaged"):
                list(mapper(fail, range(4)))
    assert found == written("native", Engine.native)


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=20)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"the Ray cluster at 127\.0\.0\.1:1 cannot be joined"):
        build(replace(config_of(corpus, tmp_path / "store"), engine=Engine.ray))
