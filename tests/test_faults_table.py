"""The page on reliability says what the tests' markers say."""

from tests.faults_table import PAGE, ROOT, page, rows


def test_the_page_is_the_markers() -> None:
    assert PAGE.read_text() == page(rows(ROOT / "tests")), "call `make faults-table`"
