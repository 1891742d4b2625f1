"""`STORE/report.html`: what each stage of the corpus kept and dropped, with samples.

No times, host names or paths: the same report.json gives the same bytes.
"""

from pathlib import Path

from launcher.report.markup import corpus, document, dropped_samples, read_json, section
from parallel.common.errors import UserError
from parallel.common.files import write_text


def write_store_page(store: Path) -> Path:
    """Writes the page beside the store's report.json.

    Raises:
        UserError: there is no report.json.
    """
    report = read_json(store / "report.json")
    if report is None:
        raise UserError(f"{store} has no report.json: `bloomery data build` makes it.")
    page = store / "report.html"
    body = [section("Corpus", corpus(report)), section("Samples of what was dropped", dropped_samples(report))]
    write_text(page, document("Token store", body))
    return page
