"""What a reader of the documentation has beside this repository: the files that its commands name, in small."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import transformers
import yaml

from data_pipeline import tokenizer
from tests.documented.commands import ROOT

_LINKS = (".venv", "benchmarks", "configs", "docs", "slurm", "tests")
_WORDS = ("iron", "ore", "charcoal", "bellows", "furnace", "slag", "hammer", "fire", "clay", "smith", "air", "heat")
_DOCUMENTS = 400
_BUILT: list[dict[str, object]] = [
    {"name": "web", "path": "web/*.jsonl", "weight": 0.7},
    {"name": "zh", "path": "zh.jsonl.gz", "text_field": "content", "language": "zh", "weight": 0.3},
]
_GROWN: list[dict[str, object]] = [{"name": "later", "path": "new.jsonl.gz"}]


def make(directory: Path) -> None:
    """Puts everything there; what stands already is made again."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in _LINKS:
        link = directory / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    (directory / "home").mkdir(exist_ok=True)
    _texts(directory)
    _tasks(directory)
    (directory / "my-run.yaml").write_text(yaml.safe_dump(_run()))
    (directory / "my-corpus.yaml").write_text(yaml.safe_dump(_corpus(_BUILT)))
    (directory / "new-sources.yaml").write_text(yaml.safe_dump(_corpus(_GROWN)))
    (directory / "my-cluster.yaml").write_text((ROOT / "configs/hardware/h100.yaml").read_text())
    (directory / "rates.txt").write_text(
        "run.name=low optimizer.learning_rate=1e-4\nrun.name=high optimizer.learning_rate=1e-3\n"
    )
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), re.DOTALL)
    (directory / "my_recipes.py").write_text("\n\n".join(blocks))
    _model(directory, directory / "home" / "models" / "Qwen3-0.6B")


def _run() -> dict[str, object]:
    """A run that takes seconds, whatever the model's file says; it stands behind that file."""
    return {
        "run": {"name": "my-run"},
        "model": {"layers": 2, "hidden_size": 64, "heads": 8, "ffn_hidden_size": 96},
        "train": {
            "steps": 6,
            "global_batch_size": 64,
            "micro_batch_size": 1,
            "sequence_length": 64,
            "log_every_steps": 2,
        },
        "data": {"store": "stores/mixed"},
        "checkpoint": {"every_steps": 1, "keep": 6},
        "evaluate": {"batches": 2},
        "tracking": {"wandb": {"mode": "disabled"}},
    }


def _corpus(sources: list[dict[str, object]]) -> dict[str, object]:
    return {
        "data": {
            "sources": sources,
            "store": "stores/mixed",
            "tokenizer": {"vocabulary_size": 512},
            "validation": {"share": 0.05},
        }
    }


def _texts(directory: Path) -> None:
    """`web/a.jsonl`, `zh.jsonl.gz`, `new.jsonl.gz` and `old/`: documents that differ, a few of them twice."""
    chosen = random.Random(0)

    def english() -> str:
        return " ".join(chosen.choice(_WORDS) + str(chosen.randrange(100)) for _ in range(chosen.randint(60, 200)))

    def chinese() -> str:
        return "".join(chr(chosen.randrange(0x4E00, 0x4E00 + 300)) for _ in range(chosen.randint(60, 200)))

    web = [english() for _ in range(_DOCUMENTS)]
    _write(directory / "web" / "a.jsonl", [{"text": text} for text in [*web, *web[-5:]]])
    _write(directory / "zh.jsonl.gz", [{"content": chinese()} for _ in range(_DOCUMENTS // 4)])
    _write(directory / "old" / "a.jsonl.gz", [{"text": text} for text in web[:100]])
    for name in ("mmlu", "gsm8k"):
        _write(directory / f"{name}.jsonl", [{"question": english()}])
    _write(directory / "chat.jsonl", [_conversation(chosen) for _ in range(100)])
    _write(directory / "new.jsonl.gz", [{"text": text} for text in [*web[50:100], *(english() for _ in range(50))]])


def _tasks(directory: Path) -> None:
    """A task of ours, and one of lm-evaluation-harness's."""
    choices = [" Paris", " Rome"]
    own: dict[str, Any] = {"name": "capitals", "kind": "multiple_choice", "data": "capitals.jsonl"}
    own |= {"prompt": "{question}\nAnswer:", "choices": choices, "target": "answer"}
    theirs: dict[str, Any] = {"task": "furnace", "dataset_path": "json", "output_type": "multiple_choice"}
    theirs |= {"dataset_kwargs": {"data_files": {"test": str(directory / "tasks" / "capitals.jsonl")}}}
    theirs |= {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_choice": choices, "doc_to_target": "answer"}
    theirs |= {"metric_list": [{"metric": "acc"}], "metadata": {"version": 1}}
    _write(
        directory / "tasks" / "capitals.jsonl",
        [{"question": f"Capital {each}?", "answer": each % 2} for each in range(8)],
    )
    (directory / "tasks" / "capitals.yaml").write_text(yaml.safe_dump(own))
    (directory / "tasks" / "furnace.yaml").write_text(yaml.safe_dump(theirs))
    (directory / "prompts.txt").write_text("iron\nore\n")


def _conversation(chosen: random.Random) -> dict[str, Any]:
    first, second = chosen.sample(_WORDS, 2)
    return {
        "messages": [
            {"role": "user", "content": f"Say {first} and {second} the other way round."},
            {"role": "assistant", "content": f"{second} {first}"},
        ]
    }


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def _model(directory: Path, path: Path) -> None:
    """A Qwen3 with random weights, made and saved by its own library, and a tokenizer."""
    settings = transformers.Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(settings).save_pretrained(path)
    texts = [json.loads(line)["text"] for line in (directory / "web" / "a.jsonl").read_text().splitlines()]
    tokenizer.train(iter(texts), 512, path / "tokenizer.json")
