"""Learning is real: each objective gets below what needs no model, and before it has learnt none does.

The text is this repository's own definitions and docstrings, held-out ones for the evaluation. A baseline is what
`bloomery evaluate` states beside the losses: of text the frequencies of its tokens, of other labels their entropy, of
pairs of segments a coin.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.store import Store
from launcher.evaluation.losses import entropy
from tests.launcher.test_encoders import BERT, T5
from tests.launcher.tiny import ROOT, configuration, ran, store_of

pytestmark = [pytest.mark.distributed, pytest.mark.truth, pytest.mark.slow]

SHORTEST, LONGEST = 60, 450  # letters; most definitions then fit into a row, so that pairs know where one begins
MODEL: dict[str, Any] = {"layers": 2, "hidden_size": 64, "heads": 4, "ffn_hidden_size": 128, "initial_std": 0.1}
OBJECTIVES: dict[str, tuple[int, dict[str, Any]]] = {
    "causal_lm": (50, {}),
    "fill_in_the_middle": (50, {"data": {"fill_in_the_middle": {"rate": 0.9}}}),
    "prefix_lm": (50, {"train": {"objective": "prefix_lm"}}),
    "masked_lm_alone": (240, {"model": {**BERT, "next_sentence": False}, "data": {"mask_documents": False}}),
    "masked_lm_next_sentence": (240, {"model": BERT, "train": {"sequence_length": 96}}),
    "span_corruption": (50, {"model": T5, "data": {"mask_documents": False}}),
}
"""Steps, and what is said beside."""


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of what stands between two blank lines and the next in this repository's modules."""
    files = sorted(
        file for room in ("data_pipeline", "launcher", "model", "parallel") for file in (ROOT / room).rglob("*.py")
    )
    texts = [f"{part}\n" for file in files for part in file.read_text().split("\n\n\n")]
    kept = [text for text in texts if SHORTEST < len(text) < LONGEST]
    mixed = [text for first in range(7) for text in kept[first::7]]
    return store_of(tmp_path_factory.mktemp("definitions") / "store", {"code": mixed})


def evaluation(config: Path, directory: Path, *overrides: str) -> dict[str, Any]:
    """What `bloomery evaluate` says after a run."""
    ran("train", config, f"run.dir={directory}", *overrides)
    ran("evaluate", directory)
    return json.loads((directory / "evaluation.json").read_text())


def learnt(found: dict[str, Any]) -> bool:
    """Whether each part of the loss is well below what needs no model, and more pairs are told than by a coin."""
    if "overall" in found:
        return found["overall"]["bits_per_byte"] < 0.9 * found["overall"]["unigram_bits_per_byte"]
    losses, baselines = found["losses"], found["baselines"]
    below = [losses[name] < 0.98 * known for name, known in baselines.items() if name != "next_sentence_accuracy"]
    return all(below) and losses.get("next_sentence_accuracy", 1) > 0.58


@pytest.mark.parametrize(
    "objective",
    [pytest.param(name, marks=pytest.mark.long) if name == "masked_lm_alone" else name for name in OBJECTIVES],
)
def test_it_learns_what_needs_looking(objective: str, definitions: Path, tmp_path: Path) -> None:
    steps, sections = OBJECTIVES[objective]
    train = {"steps": steps, "global_batch_size": 16, "micro_batch_size": 16, "sequence_length": 64}
    config = configuration(
        tmp_path,
        definitions,
        model={**MODEL, **sections.get("model", {})},
        train={**train, "log_every_steps": steps, **sections.get("train", {})},
        optimizer={"learning_rate": 4e-3, "schedule": {"warmup_steps": 20}},
        checkpoint={"every_steps": 1000},
        data={"store": str(definitions), **sections.get("data", {})},
    )
    fresh = ("train.steps=1", "optimizer.learning_rate=1e-9", "optimizer.schedule.warmup_steps=0")
    assert not learnt(evaluation(config, tmp_path / "fresh", *fresh))
    assert learnt(evaluation(config, tmp_path / "run"))
    if objective == "prefix_lm":
        said = ran("generate", tmp_path / "run", "--prompt", "def ", "--tokens", "4")
        assert said.startswith("def ")
    if objective == "fill_in_the_middle":  # validation documents are never turned; what was trained on was
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        store = Store.open(definitions)
        counts = torch.from_numpy(store.token_counts(split="training")).double()
        assert rows[-1]["loss"] < 0.9 * entropy(counts) < rows[0]["loss"]
