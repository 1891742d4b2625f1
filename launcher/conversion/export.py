"""A checkpoint's weights as safetensors: what `transformers` reads, written tensor by tensor.

Which tensor goes into which file is planned from shapes alone; then one tensor at a time is read, split, rounded and
written, so that a model larger than memory converts, whatever the size of the files. Everything is written beside the
output, which appears by one rename, after the logits were compared.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import MISSING
from torch import Tensor

from data_pipeline.examples.kinds import Facts
from data_pipeline.marks import of_tokenizer
from data_pipeline.tokenizer import Tokenizer
from launcher.config import RunConfig
from launcher.conversion.check import compare_logits, missing_transformers, pretrained
from launcher.conversion.memory import return_large_blocks
from launcher.conversion.tensor_file import write_tensor_file
from launcher.outcome import Outcome
from launcher.runtime import in_ranks
from launcher.verbs.conversion import ExportJob
from launcher.work import Ranks
from model import families, lora, mup
from model.config import ModelConfig, ObjectiveName
from model.hf.families import config_json, pairs_of
from model.hf.pairs import Pair
from model.lora import change
from model.projections import adapted, is_adapter
from parallel.average import AVERAGE
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.units import format_bytes
from parallel.updater import Kind

WEIGHT = f"{Kind.weight.value}."
"""Begins the names of weights in a checkpoint."""
_EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

logger = logging.getLogger(__name__)


class Tensors(Protocol):
    """Whole tensors under the names that they have in a checkpoint: those of a stored one, or of a model in memory."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Of all, by name."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Of one."""
        ...

    def read(self, name: str) -> Tensor:
        """One, on the CPU."""
        ...


class Weights:
    """The weights among some tensors by their own names, or their average over the steps; of adapted matrices with what
    their adapters add, once `merged` is set."""

    def __init__(self, tensors: Tensors, *, averaged: bool = False) -> None:
        """Raises:
        UserError: no average is kept.
        """
        self._tensors = tensors
        self._prefix = f"{AVERAGE}." if averaged else WEIGHT
        named = {name: shape for name, shape in self._tensors.shapes.items() if name.startswith(self._prefix)}
        self.output_factor = 1.0
        """What the output layer is multiplied by, for a model whose logits are (model/mup.py)."""
        self.merged: ModelConfig | None = None
        """The model whose adapters are merged into its matrices."""
        self.names = [name.removeprefix(self._prefix) for name in named]
        """Of all tensors."""
        self.shapes = {name.removeprefix(self._prefix): shape for name, shape in named.items() if not is_adapter(name)}
        """Of all but the adapters."""
        if averaged and not self.shapes:
            raise UserError("the checkpoint keeps no average of the weights: its run had no optimizer.average_decay.")

    def dtype(self, name: str) -> torch.dtype:
        """Of what `read` gives."""
        path, _, kind = name.rpartition(".")
        having = self.merged and kind == "weight" and adapted(self.merged, path.rpartition(".")[2])
        return torch.float32 if having else self._tensors.dtype(f"{self._prefix}{name}")

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU."""
        tensor = self._stored(name)
        added = None if self.merged is None else change(self.merged, name, self._stored)
        if added is not None:
            return tensor.float() + added
        return tensor * self.output_factor if name == OUTPUT and self.output_factor != 1 else tensor

    def _stored(self, name: str) -> Tensor:
        return self._tensors.read(f"{self._prefix}{name}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """One file of tensors, planned."""

    pairs: list[Pair]
    described: dict[str, Tensor]
    """What it will hold, by their names, on the meta device."""

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.described.values())


def work(job: ExportJob) -> int:
    """Writes the directory; returns the exit code."""
    return_large_blocks()
    return in_ranks(lambda ranks: _exported(job, ranks), job.ranks)


def _exported(job: ExportJob, ranks: Ranks) -> Outcome:
    if job.check:
        missing_transformers()
    config = job.checkpoint.config()
    tensors = Weights(StoredTensors(job.checkpoint.path), averaged=job.averaged)
    model = described_model(config, tensors)
    pairs = pairs_of(model)
    check_names(job.checkpoint.path, tensors, pairs)
    dtype: torch.dtype = getattr(torch, job.dtype)
    plan = _plan(pairs, tensors, dtype, job.shard_bytes)
    beside = job.output.with_name(f".{job.output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        total = _write_tensors(beside, plan, tensors, dtype)
        _write_descriptions(beside, job, config, model)
        if job.check:
            weights = {pair.ours: _rounded(tensors.read(pair.ours), dtype) for pair in pairs}
            compare_logits(model, weights, pretrained(beside, model), sequence_length=config.train.sequence_length)
        beside.rename(job.output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    checked = "logits as transformers computes them" if job.check else "logits not compared"
    files = "1 file" if len(plan) == 1 else f"{len(plan)} files"
    logger.info("%s: %s in %s, %s", job.output, format_bytes(total), files, checked)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"exported to {job.output}")


def described_model(config: RunConfig, tensors: Weights) -> ModelConfig:
    """The model with its vocabulary size, which the configuration leaves to the store; what muP multiplies by and what
    adapters add is in the tensors that are read from now on."""
    shape = tensors.shapes.get(_EMBEDDING)
    if shape is None:
        raise UserError("the checkpoint has no word embeddings: it is not a language model's")
    values = {name: getattr(config.model, name) for name in ModelConfig.__slots__}
    model = ModelConfig(**{**values, "vocabulary_size": shape[0]})
    tensors.output_factor = mup.logit_factor(model)
    model = mup.without(model)
    tensors.merged = None if model.lora.rank is None else model
    return lora.without(model)


def check_names(path: Path, tensors: Weights, pairs: list[Pair]) -> None:
    """Refuses a checkpoint whose tensors are not those of its family.

    Raises:
        UserError: it names one.
    """
    stored = set(tensors.shapes)
    known = {pair.ours for pair in pairs}
    for name in sorted(stored ^ known):
        told = "is not one of this family's" if name in stored else "is missing"
        raise UserError(f"{path}: the tensor {name} {told}; model.family in the run's config.yaml says the family")


def _plan(pairs: list[Pair], tensors: Weights, dtype: torch.dtype, limit: int) -> list[_File]:
    files: list[_File] = []
    for pair in pairs:
        shape = torch.empty(tensors.shapes[pair.ours], dtype=dtype, device="meta")
        described = dict(zip(pair.theirs, pair.split(shape), strict=True))
        size = sum(part.nbytes for part in described.values())
        if files and files[-1].bytes + size <= limit:
            last = files[-1]
            files[-1] = _File(pairs=[*last.pairs, pair], described={**last.described, **described})
        else:
            files.append(_File(pairs=[pair], described=described))
    return files


def _write_tensors(directory: Path, plan: list[_File], tensors: Weights, dtype: torch.dtype) -> int:
    """All files and, where there are several, their index; the bytes of the tensors."""
    places: dict[str, str] = {}
    total = sum(file.bytes for file in plan)
    for number, file in enumerate(plan, start=1):
        name = "model.safetensors" if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        write_tensor_file(directory / name, file.described, theirs(file.pairs, tensors, dtype))
        places |= dict.fromkeys(file.described, name)
        logger.info("  %s  %s (%d of %d)", name, format_bytes(file.bytes), number, len(plan))
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(directory / "model.safetensors.index.json", index)
    return total


def theirs(pairs: list[Pair], tensors: Weights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """All tensors under their names."""
    for pair in pairs:
        parts = pair.split(tensors.read(pair.ours))
        for name, part in zip(pair.theirs, parts, strict=True):
            yield name, part.to(dtype)


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).float()


def _write_descriptions(directory: Path, job: ExportJob, config: RunConfig, model: ModelConfig) -> None:
    """config.json, generation_config.json, and the tokenizer's files where the run has one."""
    ids: dict[str, Any] = {}
    run = job.checkpoint.run.path
    tokenizer, facts = tokenizer_of(run, config), facts_of(run, config)
    if tokenizer is None:
        logger.warning("no tokenizer found in %s: the export has none", config.data.store)
    if tokenizer is not None:
        ids = {
            "bos_token_id": tokenizer.end_of_document,
            "eos_token_id": tokenizer.end_of_document,
            "pad_token_id": tokenizer.padding,
        }
        if families.family(model).architecture is families.Architecture.encoder_decoder:
            ids["decoder_start_token_id"] = tokenizer.padding
        wanted, own = around(tokenizer, config), tokenizer.around
        if wanted != own and (model.classes.number or own == ([], [])):
            tokenizer.save_around(directory / "tokenizer.json", *wanted)
        else:
            tokenizer.save(directory / "tokenizer.json")
        write_json(directory / "tokenizer_config.json", _tokenizer_config(tokenizer, config, facts))
    labels = labels_of(run, config)
    described = config_json(model, sequence_length=config.train.sequence_length, labels=labels)
    _write_plain(directory / "config.json", {**described, **ids, "dtype": job.dtype})
    if not model.classes.number:
        _write_plain(directory / "generation_config.json", ids)


def around(tokenizer: Tokenizer, config: RunConfig) -> tuple[list[int], list[int]]:
    """What a model reads before and behind a text, as in training: an encoder, and one with a head for classes. A model
    that goes on with a text is given its beginning by whoever asks."""
    model, end = config.model, [tokenizer.end_of_document]
    if model.classes.number and Facts.read(Path(config.data.store)) is None:
        return tokenizer.around  # it was imported, and has learnt with its tokenizer's own
    own, imported = tokenizer.around, config.data.store == MISSING
    if imported and families.family(model).architecture is families.Architecture.encoder and own != ([], []):
        return own  # and so has this one, which never saw an end of ours
    architecture = families.family(model).architecture
    if architecture is families.Architecture.causal:
        return (end, []) if model.classes.number else ([], [])
    if architecture is families.Architecture.encoder_decoder:
        return [], end
    if families.objective(model, config.train.objective) == ObjectiveName.masked_lm:
        return end, end
    known = of_tokenizer(tokenizer)
    return [known.first], [known.separator]


def beginning(tokenizer: Tokenizer, config: RunConfig) -> int:
    """What a model that goes on with texts reads first: the end of the document before, as in training; an imported
    one, which never saw ours, what its own tokenizer puts there, if it puts one token."""
    own, _ = tokenizer.around
    return own[0] if config.data.store == MISSING and len(own) == 1 else tokenizer.end_of_document


def _write_plain(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tokenizer_of(run: Path, config: RunConfig) -> Tokenizer | None:
    """The tokenizer of the store that a run was trained on, or the one that was imported with its weights."""
    for place in (Path(config.data.store) / "tokenizer.json", run / "tokenizer.json"):
        if place.is_file():
            return Tokenizer.load(place)
    return None


def facts_of(run: Path, config: RunConfig) -> Facts | None:
    """What the examples are that a run learnt from, or the classes that were imported with its weights."""
    return Facts.read(Path(config.data.store)) or Facts.read(run)


def labels_of(run: Path, config: RunConfig) -> tuple[str, ...]:
    """Names of the classes that a model tells apart, by number; empty where it has no head for them, or none is known.

    Raises:
        UserError: there are more or fewer names than classes.
    """
    facts, number = facts_of(run, config), config.model.classes.number
    if facts is None or not number:
        return ()
    if len(facts.labels) != number:
        raise UserError(
            f"{run} tells {number} classes apart, and {config.data.store} has {len(facts.labels)}, "
            f"{', '.join(facts.labels)}: it is not the store that the run learnt from."
        )
    return facts.labels


def needed_tokenizer(run: Path, config: RunConfig) -> Tokenizer:
    """The same.

    Raises:
        UserError: there is none.
    """
    found = tokenizer_of(run, config)
    if found is None:
        raise UserError(f"{run} has no tokenizer: expected one in {config.data.store} or in the run.")
    return found


def _tokenizer_config(tokenizer: Tokenizer, config: RunConfig, facts: Facts | None) -> dict[str, Any]:
    encoder = families.family(config.model).architecture is families.Architecture.encoder
    template = None if facts is None else facts.chat_template
    end, padding = (tokenizer.token(number) for number in (tokenizer.end_of_document, tokenizer.padding))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.model.positions or config.train.sequence_length,
        "bos_token": end,
        "eos_token": end,
        "pad_token": padding,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", *(["token_type_ids"] if encoder else []), "attention_mask"],
        **({} if template is None else {"chat_template": template}),
        **(_marks(tokenizer) if encoder else {}),
    }


def _marks(tokenizer: Tokenizer) -> dict[str, str]:
    """What `transformers` asks an encoder's tokenizer for."""
    known = of_tokenizer(tokenizer)
    named = {"mask_token": known.mask, "cls_token": known.first, "sep_token": known.separator}
    return {name: tokenizer.token(number) for name, number in named.items()}
