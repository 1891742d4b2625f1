"""What checkpoints hold, read tensor by tensor on one process, whatever layout wrote them.

Memory: two whole tensors at a time, however large the model.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.config import flatten
from launcher.verbs.checkpoints import LookJob, print_table
from parallel.checkpoint.manifest import STATE, Manifest
from parallel.checkpoint.stream import StoredTensors
from parallel.common.files import write_json
from parallel.common.units import format_bytes, format_count
from parallel.updater import Kind

_SHOWN = 20
"""Rows of a table of differences; `--json` has all of them."""


def work(job: LookJob) -> int:
    """Describes one checkpoint, or compares two."""
    if len(job.paths) == 1:
        (path,) = job.paths
        found = describe(path, norms=job.norms)
        _show_description(path, found)
    else:
        found = compare(*job.paths, values=job.norms)
        _show_differences(found)
    if job.output is not None:
        write_json(job.output, found)
    return 0


def describe(path: Path, *, norms: bool) -> dict[str, Any]:
    """Everything about a checkpoint, as JSON; with `norms` every tensor is verified and read."""
    manifest = Manifest.read(path)
    stored = StoredTensors(path, verify=norms)
    return {
        "step": manifest.step,
        "attempt": manifest.attempt,
        "layout": manifest.layout,
        "versions": manifest.versions,
        "metrics": manifest.metrics,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "files": len(manifest.files) + 1,
        "state": json.loads((path / STATE).read_bytes()),
        "tensors": {
            name: {
                "shape": list(shape),
                "dtype": str(stored.dtype(name)).removeprefix("torch."),
                **(
                    {"norm": _finite(torch.linalg.vector_norm(stored.read(name), dtype=torch.float64))} if norms else {}
                ),
            }
            for name, shape in sorted(stored.shapes.items())
        },
    }


def _length(tensor: torch.Tensor) -> torch.Tensor:
    """The root of the sum of squares [], float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _finite(number: torch.Tensor) -> float | str:
    """JSON has no word for what is not finite."""
    value = number.item()
    return value if math.isfinite(value) else str(value)


def _show_description(path: Path, found: Mapping[str, Any]) -> None:
    state = found["state"]
    tokens = state.get("progress", {}).get("tokens")
    weights = [math.prod(facts["shape"]) for name, facts in found["tensors"].items() if name.startswith(Kind.weight)]
    metrics = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found["metrics"].items())
    lines = {
        "checkpoint": str(path),
        "step": f"{found['step']}" + (f", {format_count(tokens)} tokens" if tokens is not None else ""),
        "measured": metrics or "nothing",
        "parameters": format_count(sum(weights)),
        "size": f"{format_bytes(found['bytes'])} in {found['files']} files",
        "layout": ", ".join(f"{name} {value}" for name, value in found["layout"].items() if value not in (None, False)),
        "written by": ", ".join(f"{name} {value}" for name, value in found["versions"].items()),
        "attempt": found["attempt"],
        "states": ", ".join(state) or "none",
    }
    for name, text in lines.items():
        print(f"{name:<12}{text}")
    kinds = list(dict.fromkeys(kind for row in _by_parameter(found["tensors"]).values() for kind in row))
    rows = [
        (name, "x".join(map(str, next(iter(row.values()))["shape"])) or "-", *(_norm(row.get(kind)) for kind in kinds))
        for name, row in _by_parameter(found["tensors"]).items()
    ]
    print()
    heads = ("parameter", "shape", *(f"norm of {kind}" for kind in kinds))
    print_table(heads, rows, text=("parameter", "shape"))


def _by_parameter(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{parameter: {kind: facts}}, the weight first; a tensor of no parameter stands under its whole name."""
    parameters = {name.partition(".")[2] for name in tensors if name.startswith(f"{Kind.weight}.")}
    rows: dict[str, dict[str, Any]] = {parameter: {} for parameter in sorted(parameters)}
    for name, facts in sorted(tensors.items(), key=lambda item: not item[0].startswith(f"{Kind.weight}.")):
        kind, _, parameter = name.partition(".")
        if parameter in parameters:
            rows[parameter][kind] = facts
        else:
            rows[name] = {Kind.weight.value: facts}
    return rows


def _norm(facts: Mapping[str, Any] | None) -> str:
    if facts is None or "norm" not in facts:
        return ""
    return facts["norm"] if isinstance(facts["norm"], str) else f"{facts['norm']:.5g}"


def compare(a: Path, b: Path, *, values: bool) -> dict[str, Any]:
    """What differs between two checkpoints, as JSON; with `values` every tensor of both is verified and read."""
    ours, theirs = (StoredTensors(path, verify=values) for path in (a, b))
    both = [name for name in sorted(ours.shapes) if name in theirs.shapes]
    same_shape = [name for name in both if ours.shapes[name] == theirs.shapes[name]]
    differing = {}
    for name in same_shape if values else ():
        first, second = ours.read(name), theirs.read(name)
        if not torch.equal(first, second):
            differing[name] = _difference(first, second)
    return {
        "a": str(a),
        "b": str(b),
        "facts": _facts_that_differ(a, b),
        "only_a": sorted(set(ours.shapes) - set(theirs.shapes)),
        "only_b": sorted(set(theirs.shapes) - set(ours.shapes)),
        "shapes": {
            name: [list(ours.shapes[name]), list(theirs.shapes[name])] for name in both if name not in same_shape
        },
        "compared": len(same_shape) if values else 0,
        "tensors": differing,
    }


def _difference(first: torch.Tensor, second: torch.Tensor) -> dict[str, Any]:
    apart = first.double() - second.double()
    return {
        "relative": _finite(_length(apart) / _length(first).clamp(min=1e-300)),
        "largest": _finite(apart.abs().max()),
        "elements": int((first != second).sum()),
    }


def _facts_that_differ(a: Path, b: Path) -> dict[str, list[Any]]:
    facts = []
    for path in (a, b):
        manifest = Manifest.read(path)
        facts.append(
            flatten(
                {
                    "step": manifest.step,
                    "metrics": manifest.metrics,
                    "layout": manifest.layout,
                    "versions": manifest.versions,
                    "config": manifest.config,
                    "state": json.loads((path / STATE).read_bytes()),
                }
            )
        )
    first, second = facts
    keys = dict.fromkeys((*first, *second))
    return {key: [first.get(key), second.get(key)] for key in keys if first.get(key) != second.get(key)}


def _show_differences(found: Mapping[str, Any]) -> None:
    for key, (a, b) in found["facts"].items():
        print(f"{key}: {a} | {b}")
    for side in ("a", "b"):
        for name in found[f"only_{side}"]:
            print(f"{name}: only in {found[side]}")
    for name, (a, b) in found["shapes"].items():
        print(f"{name}: shape {a} | {b}")
    differing = found["tensors"]
    print(f"{found['compared'] - len(differing)} of {found['compared']} tensors that were compared are equal")
    order = sorted(differing, key=lambda name: -_number(differing[name]["relative"]))
    rows = [
        (
            name,
            *(f"{_number(differing[name][key]):.3g}" for key in ("relative", "largest")),
            f"{differing[name]['elements']:,}",
        )
        for name in order[:_SHOWN]
    ]
    if rows:
        print_table(("tensor", "|a - b| / |a|", "largest difference", "elements that differ"), rows, text=("tensor",))
    if len(order) > _SHOWN:
        print(f"and {len(order) - _SHOWN} more (--json has all)")


def _number(value: float | str) -> float:
    """A number that `_finite` made."""
    number = float(value)
    return math.inf if math.isnan(number) else number
