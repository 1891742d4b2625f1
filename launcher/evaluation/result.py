"""`evaluation.json`: what a checkpoint reached on the validation documents, beside what needs no model.

    checkpoint  step-00000120        checksum   of the checkpoint's manifest
    step        120                  store      path, tokenizer fingerprint
    overall     {bits_per_byte, unigram_bits_per_byte, xz_bits_per_byte, loss, tokens, text_bytes}
    sources     {name: the same}

or, of an objective whose labels are not the text one after the other,

    losses      {loss, and each part that the objective reports}
    baselines   {the same names: what needs no model}
    tokens      labels that counted

Imports without torch: an evaluation that stands already is shown at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.store import Store
from launcher.evaluation.baselines import bits_per_byte, text_bytes, unigram_bits_per_byte, xz_bits_per_byte
from launcher.places import Checkpoint
from parallel.common.files import hash_file, write_json
from parallel.common.units import format_bytes, format_count

NAME = "evaluation.json"
_LEGEND = "Unigram knows only how frequent each token is; xz -9 compresses the same bytes."
_LEGEND_OF_LOSSES = "Without a model: the frequencies of the labels alone, and a coin for pairs of segments."


def summarise(checkpoint: Checkpoint, store: Store, sums: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The content of the file, from {source: (summed loss in nats, predicted tokens)}."""
    nats, tokens = (sum(values[index] for values in sums.values()) for index in (0, 1))
    return {
        **identity(checkpoint, store),
        "overall": _row(store, None, nats, tokens),
        "sources": {source: _row(store, source, *values) for source, values in sums.items()},
    }


def write(checkpoint: Checkpoint, result: Mapping[str, Any]) -> Path:
    """Puts the file into the run."""
    path = checkpoint.run.path / NAME
    write_json(path, result)
    return path


def standing(checkpoint: Checkpoint, store: Store) -> dict[str, Any] | None:
    """The run's evaluation, if it is of exactly this checkpoint on this store."""
    try:
        result = json.loads((checkpoint.run.path / NAME).read_text())
        same = all(result[key] == value for key, value in identity(checkpoint, store).items())
    except (OSError, ValueError, KeyError):
        return None
    return result if same else None


def table(result: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the table that a person reads."""
    if "losses" in result:
        known = result["baselines"]
        parts = [
            (name.replace("_", " "), f"{value:.4f}", f"{known[name]:.4f}" if name in known else "")
            for name, value in result["losses"].items()
        ]
        return ("part", "model", "without a model"), parts
    rows = [
        (
            name,
            *(f"{row[key]:.3f}" for key in ("bits_per_byte", "unigram_bits_per_byte", "xz_bits_per_byte")),
            f"{row['bits_per_byte'] / row['unigram_bits_per_byte']:.2f}",
            format_bytes(row["text_bytes"]),
            format_count(row["tokens"]),
        )
        for name, row in ({**result["sources"], "all": result["overall"]}).items()
    ]
    return ("source", "model", "unigram", "xz -9", "model / unigram", "text", "tokens"), rows


def measure(result: Mapping[str, Any]) -> str:
    """What the numbers are."""
    return "Nats a label" if "losses" in result else "Bits per byte"


def legend(result: Mapping[str, Any]) -> str:
    """What stands beside the model's numbers."""
    return _LEGEND_OF_LOSSES if "losses" in result else _LEGEND


def show(result: Mapping[str, Any]) -> None:
    """Prints the table."""
    heads, rows = table(result)
    shown = Table(title=f"{measure(result)} on the validation documents, {result['checkpoint']}", title_justify="left")
    for index, head in enumerate(heads):
        shown.add_column(head, justify="right" if index else "left")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    console.print(shown)
    console.print(legend(result))


def identity(checkpoint: Checkpoint, store: Store) -> dict[str, Any]:
    """What an evaluation is of."""
    return {
        "checkpoint": checkpoint.path.name,
        "checksum": hash_file(checkpoint.path / "manifest.json"),
        "step": checkpoint.manifest.step,
        "store": {"path": str(store.path), "manifest": hash_file(store.path / "manifest.jsonl")},
    }


def _row(store: Store, source: str | None, nats: float, tokens: float) -> dict[str, Any]:
    length = text_bytes(store, source)
    return {
        "bits_per_byte": bits_per_byte(nats, length),
        "unigram_bits_per_byte": unigram_bits_per_byte(store, source),
        "xz_bits_per_byte": xz_bits_per_byte(store, source),
        "loss": nats / tokens,
        "tokens": int(tokens),
        "text_bytes": length,
    }
