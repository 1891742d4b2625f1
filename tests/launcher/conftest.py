"""One tiny token store for all tests of the launcher."""

from pathlib import Path

import pytest

import tests.libraries  # noqa: F401  before what needs them
from tests.launcher.tiny import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store with two sources."""
    return make_store(tmp_path_factory.mktemp("corpus") / "store")
