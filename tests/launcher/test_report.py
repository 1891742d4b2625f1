"""The report: one file, nothing loaded from anywhere, every text escaped, data that parses."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launcher.report.charts import Curves, charts
from launcher.report.page import comparison, page
from launcher.report.store_page import write_store_page
from launcher.run_directory import RunDirectory
from parallel.common.errors import UserError
from tests.launcher.tiny import configuration, ran


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
    ran("train", configuration(place, store, evaluate={"every_steps": 4, "batches": 1}))
    ran("evaluate", place / "run")
    found = RunDirectory(place / "run")
    evil = "</script></pre><script>alert(1)</script>"
    found.samples.append({"prompt": evil, "continuation": evil, "checkpoint": evil, "temperature": 0.0})
    for step, accuracy in ((8, 0.25), (12, 0.5), (12, 0.75)):
        found.tasks.append({"step": step, "task": f"sort{evil}", "records": 4, "accuracy": accuracy})
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
    assert '<th class="number">step 8</th><th class="number">step 12</th>' in page(directory)
    assert '<td>accuracy</td><td class="number">0.2500</td><td class="number">0.7500</td>' in page(directory)


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
    (chart,) = charts([Curves(name="a", records=records)])
    assert chart.title == "Loss"
    assert list(chart.traces[0]["x"]) == [1, 2]


def test_events_stand_on_the_curve_of_the_loss() -> None:
    records = [{"step": step, "loss": 3.0 - step} for step in (1, 2)]
    events = [
        {"event": "started", "step": 0, "time": 0.0, "attempt": "x"},
        {"event": "saved", "step": 2, "time": 1.0, "attempt": "x"},
        {"event": "resumed", "step": 2, "time": 2.0, "attempt": "y"},
    ]
    (chart,) = charts([Curves(name="a", records=records, events=events)])
    _, saves, others = chart.traces
    assert (saves["x"], saves["y"], saves["text"]) == ([2], [1.0], ["saved at step 2"])
    assert others["text"] == ["resumed at step 2"]


def test_the_mixture_is_what_each_source_gave_since_the_record_before() -> None:
    counted = [{"code": 30, "prose": 10}, {"code": 40, "prose": 40}]
    records = [{"step": step, "tokens_by_source": tokens} for step, tokens in enumerate(counted, start=1)]
    (chart,) = charts([Curves(name="a", records=records)])
    assert {trace["name"]: trace["y"] for trace in chart.traces} == {"code": [0.75, 0.25], "prose": [0.25, 0.75]}


def test_several_runs_stand_beside_each_other(directory: RunDirectory, tmp_path: Path, store: Path) -> None:
    other = RunDirectory(tmp_path / "run")
    other.path.mkdir()
    changed = configuration(tmp_path, store, run={"name": "other"}, optimizer={"learning_rate": 0.5})
    other.config.write_text(changed.read_text())
    for step in (1, 2):
        other.metrics.append({"step": step, "loss": 5.0 / step, "tokens": 128 * step})
    text = comparison([directory, other])
    reader = parsed(text)
    assert reader.loads == []
    assert reader.headings == ["Runs compared", "Runs", "Curves", "Evaluation", "Configuration"]
    names = [trace["name"] for trace in json.loads(reader.data[0])["data"]]
    assert f"{other.path}, training" in names
    assert f"{directory.path}, training" in names
    assert "<td>optimizer.learning_rate</td><td>0.01</td><td>0.5</td>" in text


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
