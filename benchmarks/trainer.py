"""The same Llama under Hugging Face's Trainer: what most people would reach for."""

import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

from model.config import ModelConfig


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random tokens, one document a row."""

    def __init__(self, rows: int, sequence: int, vocabulary_size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, vocabulary_size, (rows, sequence), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class _Clock(transformers.TrainerCallback):
    """When each part of each optimizer step ended, by the clock and by the processor."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[float, float]]] = []

    def on_step_begin(self, *_arguments: Any, **_options: Any) -> None:
        self.steps.append([])
        self._now()

    def on_pre_optimizer_step(self, *_arguments: Any, **_options: Any) -> None:
        self._now()

    def on_step_end(self, *_arguments: Any, **_options: Any) -> None:
        self._now()

    def _now(self) -> None:
        self.steps[-1].append((time.perf_counter(), time.process_time()))


class TrainerLoop:
    """Turns of a few steps; what a turn costs to begin does not count."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        vocabulary_size: int,
        sequence: int,
        micro_batch: int,
        micro_batches: int,
        dtype: torch.dtype,
    ) -> None:
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.ffn_hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                max_position_embeddings=sequence,
                tie_word_embeddings=config.tie_embeddings,
                attn_implementation="sdpa",
                use_cache=False,
            )
        )
        self._rows = Rows(64 * micro_batch, sequence, vocabulary_size)
        self._options: dict[str, Any] = {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": micro_batches,
            "bf16": dtype == torch.bfloat16,
            "use_cpu": not torch.cuda.is_available(),
            "optim": "adamw_torch_fused",
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_num_workers": 0,
        }

    def turn(self, steps: int) -> tuple[float, float, dict[str, float]]:
        """Of a step after one that does not count, medians: seconds by the clock and by the processor from the end of
        the one before it, and by phase (`forward_backward` with the clipping)."""
        clock = _Clock()
        with tempfile.TemporaryDirectory() as directory:
            arguments = transformers.TrainingArguments(output_dir=directory, max_steps=steps + 1, **self._options)
            trainer = transformers.Trainer(
                model=self.model, args=arguments, train_dataset=self._rows, callbacks=[clock]
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        ends = [step[-1] for step in clock.steps]
        between = [(after[0] - before[0], after[1] - before[1]) for before, after in pairwise(ends)]
        seconds, processor = (statistics.median(each) for each in zip(*between, strict=True))
        phases = [(updates[0] - begins[0], end[0] - updates[0]) for begins, updates, end in clock.steps[1:]]
        passes, update = (statistics.median(each) for each in zip(*phases, strict=True))
        return seconds, processor, {"forward_backward": passes, "optimizer": update}
