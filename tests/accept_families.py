"""Every causal family on real text: thirty steps, a resume that changes no bit, an export that `transformers` computes.

    python -m tests.accept_families                # about a minute; a line a family, exit code 1 where one fails
    python -m tests.accept_families --only gemma

The text is this repository's own source. The model of each family is a named size, shrunk as `bloomery verify` shrinks
it. Each run is stopped after twenty of its steps and resumed: losses, gradient norms and batches of the last ten are
compared bit for bit. The export compares logits with those of `transformers` itself, which is its own condition.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import tokenizer
from data_pipeline.store import StoreWriter, TokenizedDocument
from launcher import config as configuration
from launcher.config import to_dict
from launcher.conversion import export
from launcher.verbs.conversion import export_main
from launcher.verify.shrink import complete, shrink
from launcher.verify.world import run_world
from launcher.work import Ranks, Work
from parallel.checkpoint.manifest import whole_steps
from tests.launcher.tiny import ROOT, run
from tests.launcher.tiny import configuration as write_configuration

MODELS: dict[str, str] = {
    "gpt2": "gpt3-175b",
    "llama": "llama-8b",
    "mistral": "mistral-7b",
    "mixtral": "mixtral-8x7b",
    "qwen2": "qwen2-0.5b",
    "qwen3": "qwen3-8b",
    "qwen3_moe": "qwen3-30b-a3b",
    "gpt_neox": "pythia-12b",
    "gemma2": "gemma2-9b",
    "gemma3_text": "gemma3-12b",
    "deepseek_v2": "deepseek-v2-236b",
    "deepseek_v3": "deepseek-v3-671b",
}
"""A named size of each family."""
STEPS, STOPPED = 30, 20
_KEPT = ("step", "loss", "grad_norm", "batch_hash")


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What a run of a family showed."""

    losses: list[float]
    resumed_the_same: bool
    exported: list[str]
    """Names of the files."""


def real_store(path: Path) -> tuple[Path, float]:
    """A store of the text of this repository, and the entropy of its tokens by their shares alone, in nats."""
    files = sorted(
        file for room in ("data_pipeline", "launcher", "model", "parallel") for file in (ROOT / room).rglob("*.py")
    )
    texts = [file.read_text() for file in files]
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = tokenizer.train(iter(texts), 512, path.parent / "tokenizer.json")
    tokens = trained.encode_batch(texts)
    writer = StoreWriter(path, tokenizer=trained, configuration="families")
    documents = [
        TokenizedDocument(id=str(file.relative_to(ROOT)), tokens=ids, text_bytes=len(text.encode()))
        for file, text, ids in zip(files, texts, tokens, strict=True)
    ]
    writer.add_shard("code", "training", iter(documents))
    writer.finish()
    counts = Counter(int(token) for ids in tokens for token in ids)
    total = sum(counts.values())
    return path, -sum(count / total * math.log(count / total) for count in counts.values())


def small_model(name: str) -> tuple[dict[str, Any], int]:
    """The `model:` block of a named size, shrunk, with the store's vocabulary; and the length of its sequences."""
    file = str(ROOT / "configs" / "model" / f"{name}.yaml")
    positions = configuration.load([file]).model.positions or 8192
    (small,) = shrink(*complete(configuration.load([file], [f"train.sequence_length={min(positions, 8192)}"]), 1))
    model = {**to_dict(small.config)["model"], "vocabulary_size": None}
    if model["moe"]["shared_ffn_hidden_size"] is not None:  # in files, a number of experts
        model["moe"]["shared_ffn_hidden_size"] = 2 * model["moe"]["ffn_hidden_size"]
    return model, small.config.train.sequence_length


def train(name: str, directory: Path, store: Path) -> Trained:
    """Trains, stops and resumes, exports; a run of two ranks."""
    directory.mkdir(parents=True)
    model, length = small_model(name)
    config = write_configuration(
        directory,
        store,
        model=model,
        train={"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "sequence_length": length},
        checkpoint={"every_steps": STOPPED, "keep": 4},
    )
    _finished(run("train", config, ranks=2))
    whole = directory / "run"
    copy = directory / "resumed"
    shutil.copytree(whole, copy, ignore=lambda _, names: {"outcome.json"} & set(names))
    for step, path in whole_steps(copy / "checkpoints").items():
        if step > STOPPED:
            shutil.rmtree(path)
    _finished(run("train", config, f"run.dir={copy}", ranks=2))
    found, again = _records(whole), _records(copy)
    hf = directory / "hf"
    answer = export_main([str(copy), "--output", str(hf)])
    assert isinstance(answer, Work)
    (code,) = run_world(lambda: export._exported(answer.job, Ranks(attempt="accept")).exit_code, 1)
    assert code == 0
    return Trained(
        losses=[record["loss"] for record in found],
        resumed_the_same=[record["step"] for record in again] == list(range(1, STEPS + 1)) and found == again,
        exported=sorted(path.name for path in hf.iterdir()),
    )


def _finished(answer: tuple[list[int], str]) -> None:
    codes, said = answer
    if any(codes):
        raise SystemExit(f"exit codes {codes}\n{said[-4000:]}")


def _records(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{key: record[key] for key in _KEPT} for record in map(json.loads, lines) if "loss" in record]


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains every family and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families whose name has this in it")
    chosen = parser.parse_args(arguments).only
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        store, entropy = real_store(Path(scratch) / "store")
        print(f"entropy of the tokens by their shares: {entropy:.3f} nats", flush=True)
        for family, name in MODELS.items():
            if chosen not in family:
                continue
            started = time.monotonic()
            found = train(name, Path(scratch) / family, store)
            failed |= not found.resumed_the_same
            print(
                f"{family:<12} {name:<18} loss {found.losses[0]:.3f} -> {found.losses[-1]:.3f}   resumed "
                f"{'with the same bits' if found.resumed_the_same else 'WRONG'}   exported   "
                f"{time.monotonic() - started:3.0f} s",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
