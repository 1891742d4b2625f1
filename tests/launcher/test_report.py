"""The report: one file, nothing loaded from anywhere, every text escaped, data that parses."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher.report.charts import charts
from launcher.report.page import page
from launcher.report.store_page import write_store_page
from launcher.run_directory import RunDirectory
from parallel.common.errors import UserError
from tests.launcher.tiny import configuration, run


class Page(HTMLParser):
    """Collects what a browser would load, the embedded data, the headings and unbalanced tags."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.data: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self._inside_json = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [str(found[name]) for name in ("src", "href") if name in found]
        self._inside_json = found.get("type") == "application/json"
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._inside_json = False

    def handle_data(self, data: str) -> None:
        if self._inside_json:
            self.data.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, store: Path) -> RunDirectory:
    """A finished run with a sample that tries to break out of the page."""
    place = tmp_path_factory.mktemp("reported")
    assert run("train", configuration(place, store, evaluate={"every_steps": 4, "batches": 1}))[0] == [0]
    assert run("evaluate", place / "run")[0] == [0]
    found = RunDirectory(place / "run")
    evil = "</script></pre><script>alert(1)</script>"
    found.samples.append({"prompt": evil, "continuation": evil, "checkpoint": evil, "temperature": 0.0})
    return found


def parsed(text: str) -> Page:
    """The page, read by a parser that knows what a script is."""
    reader = Page()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_stands_alone_and_says_everything(directory: RunDirectory) -> None:
    reader = parsed(page(directory))
    assert reader.loads == []
    assert reader.headings == ["tiny", "Curves", "Evaluation", "Samples", "Corpus", "Attempts", "Configuration"]
    figures = [json.loads(text) for text in reader.data]
    losses = {trace["name"]: trace["y"] for trace in figures[0]["data"]}
    assert losses["training"] == [record["loss"] for record in directory.metrics]
    assert len(losses["validation"]) == 3


def test_texts_cannot_break_out(directory: RunDirectory) -> None:
    assert "<script>alert(1)" not in page(directory)


def test_it_follows_the_reader_s_screen(directory: RunDirectory) -> None:
    text = page(directory)
    assert "@media (prefers-color-scheme: dark)" in text
    assert not re.search(r"@import|url\(\s*['\"]?http", text.split("<script>", 1)[0])


def test_a_run_without_anything_has_a_page_too(tmp_path: Path, store: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(configuration(tmp_path, store).read_text())
    text = page(RunDirectory(tmp_path / "run"))
    for said in ("No step was logged yet", "Not evaluated yet", "None yet", "has no report.json"):
        assert said in text


def test_charts_leave_out_what_was_not_measured() -> None:
    records = [{"step": 1, "loss": 2.0, "mfu_causal": None}, {"step": 2, "loss": 1.0, "mfu_causal": None}]
    (chart,) = charts(records)
    assert chart.title == "Loss"
    assert list(chart.traces[0]["x"]) == [1, 2]


def test_the_store_has_a_page_that_the_same_report_makes_again(tmp_path: Path) -> None:
    counts = {
        "sources": {"code": {"kept": {"documents": 2, "text_bytes": 90}, "dropped": {"evil <b>": {"documents": 1}}}},
        "samples": {"evil <b>": [{"source": "code", "id": "<i>", "text": "<script>x</script>"}]},
    }
    counts["sources"]["code"]["dropped"]["evil <b>"]["text_bytes"] = 9
    stage = {"counts": counts, "changed": {"code": 1}}
    (tmp_path / "report.json").write_text(json.dumps({"stages": {"clean": stage}}))
    first = write_store_page(tmp_path).read_bytes()
    assert write_store_page(tmp_path).read_bytes() == first
    text = first.decode()
    assert parsed(text).headings == ["Token store", "Corpus", "Samples of what was dropped"]
    assert "<b>" not in text
    assert "<script>x" not in text


def test_a_store_without_a_report_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no report\.json"):
        write_store_page(tmp_path)
