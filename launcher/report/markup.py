"""What the pages of a run and of a store are made of: frame, tables, the account of the corpus. All text is escaped."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from data_pipeline.describe import line
from parallel.common.units import format_bytes


def document(title: str, body: Iterable[str], *, head_script: str = "", end_script: str = "") -> str:
    """A whole page with its style, and scripts that stand in it."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}: Bloomery</title>\n<style>\n{asset('page.css')}</style>",
        f"<script>{head_script}</script>" if head_script else "",
        f"</head>\n<body>\n<main>\n<h1>{html.escape(title)}</h1>",
        *body,
        "</main>",
        f"<script>\n{end_script}</script>" if end_script else "",
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def section(name: str, body: str) -> str:
    """A part of a page under its heading."""
    return f"<section>\n<h2>{name}</h2>\n{body}\n</section>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: Sequence[int] = (0,)) -> str:
    """A table; columns that are not named as text hold numbers."""

    def cells(values: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{'' if index in text_columns else ' class="number"'}>{html.escape(value)}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table>\n<tr>{cells(heads, "th")}</tr>\n{body}\n</table></div>'


def corpus(report: Mapping[str, Any]) -> str:
    """What each stage kept and dropped, from a store's report.json."""
    stages = "".join(
        f"<dt>{html.escape(stage)}</dt><dd>{html.escape(line(stage, outcome))}</dd>"
        for stage, outcome in report["stages"].items()
    )
    rows = []
    for stage, outcome in report["stages"].items():
        for source, counts in outcome.get("counts", {}).get("sources", {}).items():
            kept = counts["kept"]
            reasons = "; ".join(f"{lost['documents']:,} {reason}" for reason, lost in counts["dropped"].items())
            facts = (f"{kept['documents']:,}", format_bytes(kept["text_bytes"]), reasons or "nothing")
            rows.append((stage, source, *facts))
    counted = table(("stage", "source", "kept", "text", "dropped"), rows, text_columns=(0, 1, 4))
    return f"<dl>{stages}</dl>\n{counted}"


def dropped_samples(report: Mapping[str, Any]) -> str:
    """A few documents of each reason, as report.json keeps them."""
    parts = []
    for stage, outcome in report["stages"].items():
        for reason, samples in outcome.get("counts", {}).get("samples", {}).items():
            for sample in samples:
                twin = f", kept: {sample['kept_id']} (Jaccard {sample['jaccard']:.2f})" if "kept_id" in sample else ""
                about = html.escape(f"{stage}: {reason}: {sample['id']}{twin}")
                parts.append(
                    f"<figure><figcaption>{about}</figcaption><pre>{html.escape(sample['text'])}</pre></figure>"
                )
    return "\n".join(parts) or "<p>Nothing was dropped.</p>"


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file, or None where there is none that is whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def asset(name: str) -> str:
    """A file that stands beside this one."""
    return files("launcher.report").joinpath(name).read_text()
