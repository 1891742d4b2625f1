"""Acceptance of a quickstart run: `python -m tests.accept_quickstart RUN`.

Learnt: the newest checkpoint's bits per byte on the validation documents are at most 0.85 of the unigram entropy, which
is recomputed from the store. Whole: every file that a run and its store consist of is there and well-formed; each is
parsed. Prints what fails, one line each, and exits with 1; with 0 where nothing does.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from data_pipeline.store import Store
from data_pipeline.tokenizer import Tokenizer
from launcher import config as configuration
from launcher.evaluation.baselines import text_bytes, unigram_bits_per_byte
from launcher.length import total_steps
from launcher.places import Checkpoint, find_checkpoint, find_run
from launcher.run_directory import RunDirectory
from parallel.checkpoint.manifest import Manifest, whole_steps
from parallel.common.errors import UserError
from parallel.common.files import hash_file

LARGEST_RATIO = 0.85
"""Of bits per byte to unigram entropy; a plain loop reaches 0.80 in two minutes."""
METRICS = (
    "step", "loss", "tokens", "samples", "learning_rate", "grad_norm", "tokens_per_second", "mfu_causal", "mfu_full",
    "memory_bytes", "time_data_seconds", "time_forward_backward_seconds", "time_communication_seconds",
    "time_optimizer_seconds", "time_save_seconds", "batch_hash",
)  # fmt: skip
_NULLABLE = ("mfu_causal", "mfu_full")
Failures = Iterable[str]


def learnt(checkpoint: Checkpoint, store: Store) -> Failures:
    """The evaluation is of this checkpoint, on this store, and below the bar."""
    try:
        found = json.loads((checkpoint.run.path / "evaluation.json").read_text())
    except (OSError, ValueError) as error:
        yield f"evaluation.json: {error}"
        return
    if found["checksum"] != hash_file(checkpoint.path / "manifest.json"):
        yield f"evaluation.json is of another checkpoint than {checkpoint.path.name}"
    overall = found["overall"]
    if overall["text_bytes"] != text_bytes(store):
        yield f"evaluation.json speaks of {overall['text_bytes']} bytes, the store has {text_bytes(store)}"
    tokens = sum(shard.tokens for shard in store.shards(split="validation"))
    if not 0 <= tokens - overall["tokens"] <= len(store.sources):
        yield f"{overall['tokens']} tokens were predicted, the validation documents have {tokens}"
    reached = overall["loss"] * overall["tokens"] / math.log(2) / text_bytes(store)
    if not math.isclose(reached, overall["bits_per_byte"], rel_tol=1e-9):
        yield f"evaluation.json contradicts itself: {overall['bits_per_byte']} bits per byte, its loss means {reached}"
    unigram = unigram_bits_per_byte(store)
    if not reached <= LARGEST_RATIO * unigram:
        ratio = f"{reached / unigram:.3f} of the unigram entropy of {unigram:.3f}"
        yield f"{reached:.3f} bits per byte are {ratio}: expected at most {LARGEST_RATIO}"


def records_whole(run: RunDirectory) -> Failures:
    """The line files: each parses, steps rise, floats are finite, an attempt has what it needs."""
    steps = []
    for record in run.metrics:
        missing = [key for key in METRICS if key not in record]
        if missing:
            yield f"metrics.jsonl: step {record.get('step')} lacks {', '.join(missing)}"
            return
        wrong = [key for key in METRICS if key not in _NULLABLE and key != "batch_hash" and not _finite(record[key])]
        if wrong:
            yield f"metrics.jsonl: step {record['step']} has no finite {', '.join(wrong)}"
        steps.append(record["step"])
    if not steps or steps != sorted(set(steps)):
        yield "metrics.jsonl: no steps, or a step that stands twice"
    for attempt in run.history:
        missing = {"attempt", "time", "from_step", "changes", "layout", "versions", "job"} - set(attempt)
        if missing:
            yield f"history.jsonl: an attempt lacks {', '.join(sorted(missing))}"
    if not list(run.history):
        yield "history.jsonl: no attempt"
    events = [event["event"] for event in run.events]
    if "saved" not in events or events[-1] != "finished":
        yield f"events.jsonl: expected a save and, last, the end; got {events[-3:]}"
    if not list(run.samples):
        yield "samples.jsonl: no sample"


def ended(run: RunDirectory) -> Failures:
    """The run reached its goal, and its configuration is complete."""
    config = configuration.load([run.config])
    if configuration.missing(config, *configuration.to_dict(config)):
        yield "config.yaml has open keys"
    outcome = json.loads(run.outcome.read_text())
    wanted = total_steps(config)
    if (outcome["exit_code"], outcome["step"]) != (0, wanted):
        yield f"outcome.json: expected the end after step {wanted}, got {outcome}"
    if "attempt" not in json.loads(run.lock.read_text()):
        yield "lock does not say who wrote the run"
    if not any(path.stat().st_size for path in run.logs.glob("rank-*.log")):
        yield "logs/ has no log of a rank"


def checkpoints_whole(run: RunDirectory) -> Failures:
    """Every step directory has exactly the files of its manifest, undamaged; nothing half-written is left."""
    if not whole_steps(run.checkpoints):
        yield "checkpoints/: no whole step"
    for path in run.checkpoints.iterdir():
        if not path.name.startswith("step-"):
            yield f"checkpoints/{path.name} is left over"
            continue
        manifest = Manifest.read(path)
        there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        if there != {*manifest.files, "manifest.json"}:
            yield f"checkpoints/{path.name} has other files than its manifest names"
        for name, facts in manifest.files.items():
            if hash_file(path / name) != facts.hash:
                yield f"checkpoints/{path.name}/{name} is damaged"
        state = json.loads((path / "state.json").read_text())
        if state["progress"]["step"] != manifest.step:
            yield f"checkpoints/{path.name}/state.json is of step {state['progress']['step']}"


def tracked(run: RunDirectory) -> Failures:
    """The offline Weights & Biases run, under one id."""
    identity = (run.path / "wandb" / "id").read_text().strip()
    files = list((run.path / "wandb").glob("*run-*/*.wandb"))
    if not files:
        yield "wandb/: no offline run"
    for file in files:
        if file.name != f"run-{identity}.wandb" or not file.read_bytes().startswith(b":W&B"):
            yield f"{file} is not the offline file of run {identity}"


def pages_stand_alone(paths: Iterable[Path]) -> Failures:
    """HTML that parses, loads nothing, and whose embedded data is JSON."""
    for path in paths:
        reader = _Page()
        reader.feed(path.read_text())
        reader.close()
        if reader.loads:
            yield f"{path} loads {reader.loads[0]}"
        if "Corpus" not in reader.text:
            yield f"{path} does not speak of the corpus"
        for text in reader.data:
            json.loads(text)


def store_whole(store: Store) -> Failures:
    """Every file of the store against its hash; its tokenizer and its report parse."""
    store.check()
    if Tokenizer.load(store.tokenizer).vocabulary_size != store.vocabulary_size:
        yield "tokenizer.json has another vocabulary than the store"
    if not json.loads((store.path / "report.json").read_text())["stages"]:
        yield "report.json of the store tells of no stage"
    for split in ("training", "validation"):
        if not store.shards(split=split):
            yield f"the store has no {split} documents"


def failures(text: str) -> list[str]:
    """Everything that is wrong with a run."""
    run = find_run(text)
    checkpoint = find_checkpoint(text)
    store = Store.open(Path(configuration.load([run.config]).data.store))
    checks: list[tuple[str, Callable[[], Failures]]] = [
        ("learnt", lambda: learnt(checkpoint, store)),
        ("records", lambda: records_whole(run)),
        ("end", lambda: ended(run)),
        ("checkpoints", lambda: checkpoints_whole(run)),
        ("tracking", lambda: tracked(run)),
        ("pages", lambda: pages_stand_alone([run.path / "report.html", store.path / "report.html"])),
        ("store", lambda: store_whole(store)),
    ]
    found: list[str] = []
    for name, check in checks:
        try:
            for failure in check():
                found.append(f"{name}: {failure}")  # one by one: what came before an error counts too
        except (OSError, ValueError, KeyError, IndexError, UserError) as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


def main() -> int:
    """Checks the run that the command line names."""
    if len(sys.argv) != 2:
        print("usage: python -m tests.accept_quickstart RUN", file=sys.stderr)
        return 2
    try:
        found = failures(sys.argv[1])
    except UserError as error:
        found = [str(error)]
    for failure in found:
        print(failure)
    print(f"{sys.argv[1]}: {'accepted' if not found else f'{len(found)} failures'}")
    return 1 if found else 0


class _Page(HTMLParser):
    """What a browser would load, the data that is embedded, the text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.data: list[str] = []
        self.text = ""
        self._script: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [str(found[name]) for name in ("src", "href") if name in found]
        self._script = found.get("type") or "text/javascript" if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script == "application/json":
            self.data.append(data)
        elif self._script is None:
            self.text += data


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


if __name__ == "__main__":
    sys.exit(main())
