"""Families from text to `transformers`: thirty steps, a resume that changes no bit, an export whose logits are theirs.

Those whose features are their own alone; `python -m tests.accept_families` does it for all.
"""

from pathlib import Path

import pytest

from model.config import FamilyName
from model.families import FAMILIES, Architecture
from tests.accept_families import MODELS, real_store, train


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_store(tmp_path_factory.mktemp("text") / "store")[0]


def test_each_family_of_one_causal_stack_has_a_run() -> None:
    assert MODELS.keys() == {name for name in FamilyName if FAMILIES[name].architecture is Architecture.causal}


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["gemma3_text", "deepseek_v3"])
def test_a_family_trains_resumes_and_exports(family: str, tmp_path: Path, text: Path) -> None:
    found = train(MODELS[family], tmp_path / "made", text)
    assert found.losses[-1] < found.losses[0] - 0.5
    assert found.resumed_the_same
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {*found.exported}
