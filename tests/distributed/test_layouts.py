"""The rows of tests/layouts.yaml and tests/families.yaml that are proven each time; `bloomery verify --matrix` proves
all of them."""

from pathlib import Path

import pytest
import yaml

from launcher.verify.matrix import Row, read_rows
from launcher.verify.proof import proofs

pytestmark = [pytest.mark.distributed, pytest.mark.truth, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    ROOT / "tests" / "layouts.yaml": [str(ROOT / "configs" / "quickstart.yaml")],
    ROOT / "tests" / "families.yaml": [],
}
NAMES = [row["name"] for file in FILES for row in yaml.safe_load(file.read_text()) if row.get("ci")]


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    """The rows by name; made here, since they take two seconds and each worker collects all tests."""
    found = [row for file, before in FILES.items() for row in read_rows(file, before, [], only_ci=True)]
    assert len(found) == len(NAMES)
    return {row.name: row for row in found}


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_equals_one_rank(rows: dict[str, Row], name: str) -> None:
    for proof in proofs(rows[name].proofs[0]):
        wrong = [str(check) for check in proof.comparison.checks if not check.passed]
        assert proof.passed, f"{proof.name}: {proof.comparison.crash or wrong}"
