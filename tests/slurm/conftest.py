"""A cluster for each test, the tiny corpus, and runs to which nothing happened."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.launcher.tiny import make_store, ran
from tests.slurm.cluster import Cluster, running, why_not
from tests.slurm.jobs import Step, steps_of, tiny_run


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store with two sources."""
    return make_store(tmp_path_factory.mktemp("corpus") / "store")


@pytest.fixture(scope="session")
def reason() -> str | None:
    """Why there is no Slurm here; looked for, and installed where it is missing, once."""
    return why_not()


@pytest.fixture
def cluster(reason: str | None) -> Iterator[Cluster]:
    """Four nodes of its own; at the end nothing of a job is left on any."""
    if reason is not None:
        pytest.skip(reason)
    with running() as started:
        yield started


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Callable[..., list[Step]]:
    """The steps of a run to which nothing happened, on so many forked ranks, in the same layout."""

    @cache
    def steps(ranks: int = 2) -> list[Step]:
        directory = tmp_path_factory.mktemp("undisturbed")
        config = tiny_run(directory, store, "undisturbed")
        ran("train", config, ranks=ranks)
        return steps_of(config.parent / "run")

    return steps
