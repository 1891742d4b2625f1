"""One line for each stage, made from what the stage left behind: the same words when it runs and when it is reused."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.report import dropped, kept, kept_and_dropped, reasons
from parallel.common.units import format_bytes, format_count

_GOOD_RECALL = 0.99
"""Share of the pairs at the threshold itself that the bands should find; of closer pairs they find more."""


def line(stage: str, outcome: Mapping[str, Any]) -> str:
    """What a stage kept and dropped, in human units."""
    if set(outcome) == {"counts"}:  # of a growing store, over all portions
        return kept_and_dropped(outcome["counts"])
    return _LINES[stage](outcome)


def fields_hint(outcome: Mapping[str, Any]) -> str:
    """The end of an error about records without text: the fields that they have."""
    fields = sorted({name for names in outcome["fields_without_text"].values() for name in names})
    return f"; set text_field to one of the fields there: {', '.join(fields[:20])}" if fields else ""


def _read(outcome: Mapping[str, Any]) -> str:
    counts = outcome["counts"]
    documents, text_bytes = kept(counts)
    per_source = ", ".join(
        f"{source} {kept(counts, source)[0]:,} ({format_bytes(kept(counts, source)[1])}) "
        f"from {_plural(outcome['files'][source] - outcome['left_out_by_limit'].get(source, 0), 'file')}"
        for source in counts["sources"]
    )
    text = f"{_plural(documents, 'document')}, {format_bytes(text_bytes)}: {per_source}{reasons(dropped(counts))}"
    characters = sum(entry["characters"] for entry in outcome["undecodable"].values())
    if characters:
        broken = sum(entry["documents"] for entry in outcome["undecodable"].values())
        text += f"; replaced {characters:,} undecodable characters in {_plural(broken, 'document')}"
    if outcome["repeated_ids"]:
        text += f"; {_plural(outcome['repeated_ids'], 'repeated id')} made unique"
    passed_over = sum(outcome["passed_over"].values())
    if passed_over:
        text += f"; passed over {_plural(passed_over, 'file')} of unknown format"
    return text


def _clean(outcome: Mapping[str, Any]) -> str:
    return f"{kept_and_dropped(outcome['counts'])}; normalised {sum(outcome['changed'].values()):,}"


def _filters(outcome: Mapping[str, Any]) -> str:
    text = kept_and_dropped(outcome["counts"])
    if outcome["languages"]:
        total: Counter[str] = Counter()
        for counts in outcome["languages"].values():
            total.update(counts)
        shown = ", ".join(f"{code} {count:,}" for code, count in total.most_common(8))
        text += f"; languages that came in: {shown}{', others' if len(total) > 8 else ''}"
    masked: Counter[str] = Counter()
    for counts in outcome["masked"].values():
        masked.update(counts)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(masked.items()))
    return f"{text}; masked {kinds}" if kinds else text


def _decontaminate(outcome: Mapping[str, Any]) -> str:
    files = outcome["evaluation"]
    text = kept_and_dropped(outcome["counts"])
    text += "; " + ", ".join(
        f"{name}: {facts['met']:,} of {_plural(facts['items'], 'item')} met" for name, facts in files.items()
    )
    short = sum(facts["too_short"] for facts in files.values())
    return f"{text}; {_plural(short, 'item')} shorter than {outcome['ngram']} tokens not looked for" if short else text


def _near(outcome: Mapping[str, Any]) -> str:
    recall = outcome["expected_recall"]
    if recall >= _GOOD_RECALL:
        return _deduplicated(outcome)
    hint = f"the bands find only {recall:.0%} of the pairs at {outcome['threshold']:g}: give more bands or fewer rows"
    return f"{_deduplicated(outcome)}; {hint}"


def _deduplicated(outcome: Mapping[str, Any]) -> str:
    empty = [source for source in outcome["counts"]["sources"] if kept(outcome["counts"], source)[0] == 0]
    warning = f"; nothing is left of {', '.join(empty)}" if empty else ""
    return kept_and_dropped(outcome["counts"]) + warning


def _split(outcome: Mapping[str, Any]) -> str:
    totals = {
        split: (
            sum(entry[split]["documents"] for entry in outcome["sources"].values()),
            sum(entry[split]["text_bytes"] for entry in outcome["sources"].values()),
        )
        for split in ("training", "validation")
    }
    text = "; ".join(
        f"{split} {_plural(documents, 'document')}, {format_bytes(size)}" for split, (documents, size) in totals.items()
    )
    return text if totals["validation"][0] else f"{text} (too few documents to hold one out)"


def _tokenizer(outcome: Mapping[str, Any]) -> str:
    if "given" in outcome:
        return f"{outcome['vocabulary_size']:,} tokens, as given"
    total = sum(outcome["sample_bytes"].values())
    shares = ", ".join(f"{source} {format_bytes(size)}" for source, size in outcome["sample_bytes"].items())
    return f"{outcome['vocabulary_size']:,} tokens, trained on {format_bytes(total)} ({shares})"


def _store(outcome: Mapping[str, Any]) -> str:
    splits = {"training": 0, "validation": 0}
    text_bytes = 0
    for entry in outcome["sources"].values():
        for split, facts in entry.items():
            splits[split] += facts["tokens"]
            text_bytes += facts["text_bytes"]
    tokens = sum(splits.values())
    return (
        f"{format_count(splits['training'])} training tokens, {format_count(splits['validation'])} validation tokens "
        f"in {_plural(outcome['shards'], 'shard')}; {text_bytes / tokens:.2f} bytes a token"
    )


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


_LINES = {
    "read": _read,
    "clean": _clean,
    "filters": _filters,
    "exact": _deduplicated,
    "near": _near,
    "decontaminate": _decontaminate,
    "split": _split,
    "tokenizer": _tokenizer,
    "store": _store,
}
