"""Finished stores: recognised when nothing changed, refused under another configuration, never changed unasked.

report.json says from which settings and files a store was built, stage by stage. Files are compared by name and size;
where only their times differ, the documents are read again and their digest decides.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipeline.config import DataConfig, DecontaminateConfig, SourceConfig, SourceFormat
from data_pipeline.decontaminate import evaluation_fingerprints
from data_pipeline.read import digest_of
from data_pipeline.sources import SourceFiles, fingerprint_of_files
from data_pipeline.stages import Workspace, fingerprint_of
from data_pipeline.store import Shard, Store
from parallel.common.errors import UserError
from parallel.common.files import hash_file
from parallel.common.lines import JsonLines

MANIFEST = "manifest.jsonl"
REPORT = "report.json"
CLUSTERS = "clusters.parquet"
STAGES = "stages"
GROWTH = "growth"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A store that is what the configuration asks for."""

    store: Store
    report: dict[str, Any]


def settings_of(config: DataConfig) -> dict[str, Any]:
    """What each stage's output depends on besides its input; JSON, without paths."""
    path = config.tokenizer.path
    if path is not None:
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"data.tokenizer.path is {path}: there is no tokenizer.json of Hugging Face tokenizers")
        tokenizer: dict[str, Any] = {"hash": hash_file(file)}
    else:
        tokenizer = {
            "vocabulary_size": config.tokenizer.vocabulary_size,
            "sample_bytes": config.tokenizer.sample_bytes,
            "mixture": config.weights,
        }
    stages = config.stages
    settings = {
        "read": [_read_settings(source) for source in config.sources],
        "clean": asdict(stages.clean),
        # What is switched off leaves no trace: stores of older versions stay what they are.
        **({"filters": _filter_settings(config)} if stages.filters.enabled else {}),
        "exact": {"enabled": stages.exact_dedup},
        "near": asdict(stages.near_dedup),
        **({"decontaminate": _decontaminate_settings(stages.decontaminate)} if stages.decontaminate.files else {}),
        "split": {"share": config.validation.share},
        "tokenizer": tokenizer,
        "store": {"shard_tokens": config.shard_tokens},
    }
    return json.loads(json.dumps(settings))


def _read_settings(source: SourceConfig) -> dict[str, Any]:
    """Split and subset say something of Hugging Face datasets only; language and weight matter to other stages."""
    left_out = {"path", "language", "weight"}
    left_out |= set() if source.format is SourceFormat.datasets else {"split", "subset"}
    return {name: value for name, value in asdict(source).items() if name not in left_out}


def _filter_settings(config: DataConfig) -> dict[str, Any]:
    languages = {source.name: source.language for source in config.sources if source.language is not None}
    return {**asdict(config.stages.filters), "languages": languages}


def _decontaminate_settings(settings: DecontaminateConfig) -> dict[str, Any]:
    names = [Path(file).name for file in settings.files]
    return {"files": names, "hashes": evaluation_fingerprints(settings), "ngram": settings.ngram}


def state_of(sources: Iterable[SourceFiles]) -> str:
    """xxh3-128 of where the input files are, how large and how old."""
    digest = xxhash.xxh3_128()
    for source in sources:
        for file in source.files:
            digest.update(
                f"{source.config.name}\0{file.path}\0{file.bytes}\0{file.modified_ns}\0".encode(
                    "utf-8", "surrogateescape"
                )
            )
    return digest.hexdigest()


def report_of(
    settings: dict[str, Any], sources: Sequence[SourceFiles], stages: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The content of report.json; the same for the same input."""
    return {
        "format": _FORMAT,
        "configuration": settings,
        "inputs": {
            "files": sum(len(source.files) for source in sources),
            "bytes": sum(file.bytes for source in sources for file in source.files),
            "fingerprint": fingerprint_of_files(sources),
            "digest": stages["read"]["digest"],
        },
        "stages": stages,
    }


def store_outcome(shards: Iterable[Shard], sources: Iterable[str]) -> dict[str, Any]:
    """Counts of the sealed shards, by source and split."""
    counts: dict[str, dict[str, dict[str, int]]] = {source: {} for source in sources}
    number = 0
    for shard in shards:
        entry = counts[shard.source].setdefault(shard.split, {"documents": 0, "tokens": 0, "text_bytes": 0})
        entry["documents"] += shard.documents
        entry["tokens"] += shard.tokens
        entry["text_bytes"] += shard.text_bytes
        number += 1
    return {"shards": number, "sources": counts}


def find(root: Path, settings: dict[str, Any], sources: Sequence[SourceFiles], *, overwrite: bool) -> Finished | None:
    """The finished store in a directory, if it is what is wanted; None where there is none.

    Args:
        overwrite: A finished store that is not what is wanted, or is damaged, is removed (its stages stay).

    Raises:
        UserError: it was built from another configuration or other files, or is damaged.
    """
    if not _is_finished(root):
        return None
    try:
        report = json.loads((root / REPORT).read_bytes())
        assert report["format"] == _FORMAT
        changed = _changes(root, report, settings, sources)
        if not changed:
            return Finished(store=Store.open(root), report=report)
        error = UserError(
            f"{root} was finished under another configuration (changed: {', '.join(changed)}): give another "
            f"data.store, or --overwrite to build it anew from the first change on"
        )
    except (OSError, ValueError, KeyError, AssertionError):
        error = UserError(f"{root / REPORT} is missing or damaged: give another data.store, or --overwrite")
    except UserError as damage:
        error = damage
    if not overwrite:
        raise error
    remove(root)
    return None


def remove(root: Path) -> None:
    """Takes a store away, its manifest first; the stages' files stay."""
    (root / MANIFEST).unlink(missing_ok=True)
    for pattern in ("shard-*", "tokenizer.json", REPORT, CLUSTERS, "report.html"):
        for file in root.glob(pattern):
            file.unlink()


def begun_under(root: Path) -> str | None:
    """The configuration in the header of a store that is being written."""
    header = next(iter(_lines(root)), None)
    return None if header is None else header.get("configuration", "")


def _is_finished(root: Path) -> bool:
    return any(line.get("kind") == "end" for line in _lines(root))


def _lines(root: Path) -> list[dict[str, Any]]:
    try:
        return list(JsonLines(root / MANIFEST))
    except ValueError as error:
        raise UserError(f"{root / MANIFEST} is damaged: remove {root}, or give another data.store") from error


def _changes(root: Path, report: dict[str, Any], settings: dict[str, Any], sources: Sequence[SourceFiles]) -> list[str]:
    """The stages whose settings changed, and whether the input did."""
    then = report["configuration"]
    changed = [stage for stage in settings if then.get(stage) != settings[stage]]
    if report["inputs"]["fingerprint"] != fingerprint_of_files(sources):
        return ["the input files", *changed]
    if changed or not (root / STAGES).is_dir():
        return changed
    workspace = Workspace(root / STAGES)
    read = workspace.find("read")
    now = fingerprint_of("read", settings["read"], [state_of(sources)])
    if read is None or read.fingerprint == now:
        return changed
    if digest_of(sources) != report["inputs"]["digest"]:
        return ["the content of the input files"]
    workspace.relabel("read", now)
    return changed
