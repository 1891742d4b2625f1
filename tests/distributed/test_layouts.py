"""The rows of tests/layouts.yaml and tests/families.yaml that are proven each time; `bloomery verify --matrix` proves
all of them."""

from pathlib import Path

import pytest

from launcher.verify.matrix import Row, read_rows
from launcher.verify.proof import proofs

pytestmark = [pytest.mark.distributed, pytest.mark.truth, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    *read_rows(ROOT / "tests" / "layouts.yaml", [str(ROOT / "configs" / "quickstart.yaml")], [], only_ci=True),
    *read_rows(ROOT / "tests" / "families.yaml", [], [], only_ci=True),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_layout_equals_one_rank(row: Row) -> None:
    for proof in proofs(row.proofs[0]):
        wrong = [str(check) for check in proof.comparison.checks if not check.passed]
        assert proof.passed, f"{proof.name}: {proof.comparison.crash or wrong}"
