"""What each stage kept and dropped, per source and reason, with a few samples: for the screen and for report.json.

The same counts serve both, so that a stage that is reused says what it said when it ran. No times and no host names:
the report is part of the store, and the same input gives the same bytes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from parallel.common.errors import UserError
from parallel.common.units import format_bytes

SAMPLES = 3
"""Documents that are shown for each reason of a stage."""
_SAMPLE_CHARACTERS = 200
_FEW_DOCUMENTS = 100
"""A source with fewer is not held to the share that a stage may drop."""


class Tally:
    """Counts of one stage."""

    def __init__(self, sources: Iterable[str]) -> None:
        self._kept = {source: [0, 0] for source in sources}
        self._dropped: dict[str, dict[str, list[int]]] = {source: {} for source in self._kept}
        self._samples: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def keep(self, source: str, documents: int, text_bytes: int) -> None:
        """Counts documents that go on."""
        self._kept[source][0] += documents
        self._kept[source][1] += text_bytes

    def drop(self, source: str, reason: str, identifier: str, text_bytes: int, text: str, **facts: Any) -> None:
        """Counts a document that does not go on; the first few of a reason are kept as samples, with these facts."""
        self.drop_many(source, reason, 1, text_bytes)
        if self._wants_sample(reason):
            shown = {"source": source, "id": identifier, **facts, "text": text[:_SAMPLE_CHARACTERS]}
            self._samples[reason].append(shown)

    def drop_many(self, source: str, reason: str, documents: int, text_bytes: int) -> None:
        """Counts documents of which no sample is shown."""
        counts = self._dropped[source].setdefault(reason, [0, 0])
        counts[0] += documents
        counts[1] += text_bytes

    def _wants_sample(self, reason: str) -> bool:
        """Fewer samples of this reason are kept than are shown."""
        return len(self._samples[reason]) < SAMPLES

    def to_json(self) -> dict[str, Any]:
        """The counts, sources in the order of the configuration, reasons by name."""
        return {
            "sources": {
                source: {
                    "kept": {"documents": kept[0], "text_bytes": kept[1]},
                    "dropped": {
                        reason: {"documents": documents, "text_bytes": text_bytes}
                        for reason, (documents, text_bytes) in sorted(self._dropped[source].items())
                    },
                }
                for source, kept in self._kept.items()
            },
            "samples": {reason: samples for reason, samples in sorted(self._samples.items()) if samples},
        }


def kept(counts: Mapping[str, Any], source: str | None = None) -> tuple[int, int]:
    """Documents and bytes of text that a stage kept, of one source or of all."""
    chosen = counts["sources"].values() if source is None else [counts["sources"][source]]
    return (
        sum(entry["kept"]["documents"] for entry in chosen),
        sum(entry["kept"]["text_bytes"] for entry in chosen),
    )


def dropped(counts: Mapping[str, Any], source: str | None = None) -> dict[str, int]:
    """Documents that a stage dropped, by reason, the commonest first."""
    totals: dict[str, int] = defaultdict(int)
    for name, entry in counts["sources"].items():
        if source in (None, name):
            for reason, dropped_counts in entry["dropped"].items():
                totals[reason] += dropped_counts["documents"]
    return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def kept_and_dropped(counts: Mapping[str, Any]) -> str:
    """`kept 9,120 of 10,000 documents, 38.1 MiB; dropped 880: 700 too short, 180 too long`."""
    documents, text_bytes = kept(counts)
    lost = dropped(counts)
    total = documents + sum(lost.values())
    return f"kept {documents:,} of {total:,} documents, {format_bytes(text_bytes)}{reasons(lost)}"


def reasons(lost: Mapping[str, int]) -> str:
    """The end of a stage's line: what was dropped, and why."""
    if not lost:
        return "; dropped none"
    why = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
    return f"; dropped {sum(lost.values()):,}: {why}"


def refuse_empty(stage: str, counts: Mapping[str, Any], *, every_source: bool, hint: str = "") -> None:
    """Stops a build of which a stage left nothing.

    Raises:
        UserError: no document is left (`every_source`: of one source), with the reasons.
    """
    for source in [*counts["sources"], None] if every_source else [None]:
        if kept(counts, source)[0] == 0:
            what = "the corpus is empty" if source is None else f"the data source {source} is empty"
            lost = dropped(counts, source)
            why = ", ".join(f"{count:,} {reason}" for reason, count in lost.items()) or "nothing came in"
            raise UserError(f"{what} after the stage {stage}: all documents were dropped ({why}){hint}")


def refuse_large_loss(stage: str, counts: Mapping[str, Any], most: float) -> None:
    """Stops a job in which a stage drops nearly all of a source, which nobody may notice otherwise.

    Raises:
        UserError: more than the share `most` of a source's documents, of 100 or more, was dropped.
    """
    for source in counts["sources"]:
        lost = dropped(counts, source)
        gone = sum(lost.values())
        total = gone + kept(counts, source)[0]
        if total >= _FEW_DOCUMENTS and gone > most * total:
            why = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
            raise UserError(
                f"the stage {stage} drops {gone:,} of the {total:,} documents of the data source {source} ({why}): "
                f"more than data.stages.max_dropped_share = {most:g}; mend the source, leave it out or raise the share"
            )
