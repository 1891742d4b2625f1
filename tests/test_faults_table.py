"""The page on reliability says what the tests' markers say, and no fault and no time is missing."""

from tests.faults_table import PAGE, ROOT, lacking, page, rows


def test_the_page_is_the_markers() -> None:
    assert PAGE.read_text() == page(rows(ROOT / "tests")), "call `make faults-table`"


def test_each_fault_has_a_test_and_each_test_its_time() -> None:
    assert lacking(rows(ROOT / "tests")) == []
