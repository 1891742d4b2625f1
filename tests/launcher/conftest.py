"""What tests of the launcher share: a tiny token store, and classes that forked ranks would each import."""

from pathlib import Path

import pytest
import transformers

import tests.libraries  # noqa: F401  before what needs them
from tests.launcher.tiny import make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store with two sources."""
    return make_store(tmp_path_factory.mktemp("corpus") / "store")


@pytest.fixture(scope="session")
def transformers_imported() -> None:
    """For files whose forked ranks ask `transformers` for models: it imports a class (0.3 s) when it is looked up."""
    assert transformers.AutoConfig
    assert transformers.LlamaForCausalLM
    assert transformers.BertForMaskedLM
    assert transformers.T5ForConditionalGeneration
