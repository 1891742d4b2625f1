"""A Hugging Face model as step 0 of a run: weights only, in the format that every layout loads.

Tensors are read from safetensors, joined and written one at a time, so that a model larger than memory converts.
Pickled weights are refused: reading them would run code. The run appears by one rename.
"""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from launcher import config as configuration
from launcher.config import RunConfig
from launcher.conversion.check import compare_logits, missing_transformers
from launcher.conversion.export import WEIGHT
from launcher.conversion.step import write_weights
from launcher.outcome import Outcome
from launcher.run_directory import RunDirectory
from launcher.runtime import in_ranks
from launcher.verbs.conversion import ImportJob
from launcher.work import Ranks
from model.config import ModelConfig
from model.hf.families import FAMILIES, family_of, model_values
from model.hf.pairs import Pair
from model.size import parameter_count
from parallel.common.errors import UserError
from parallel.common.units import format_count

_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names of tensors that are no weights: masks and tables that older files hold."""
_CHECKED_LENGTH = 32

logger = logging.getLogger(__name__)


class _Files:
    """The tensors of a directory of safetensors, by name."""

    def __init__(self, directory: Path, old_names: Mapping[str, str]) -> None:
        """`old_names`: ends of names that are read as others."""
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            pickled = sorted(path.name for path in directory.glob("*.bin"))
            hint = f": {pickled[0]} would run code when it is read; convert it to safetensors first" if pickled else ""
            raise UserError(f"{directory} has no *.safetensors{hint}.")
        self._files = {_today(name, old_names): (file, name) for file in files for name in self._names(file)}

    @staticmethod
    def _names(file: Path) -> list[str]:
        try:
            with safe_open(file, framework="pt") as content:
                return list(content.keys())
        except SafetensorError as error:
            raise UserError(f"{file} is damaged: it cannot be read as safetensors ({error}).") from None

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> list[int]:
        file, stored = self._files[name]
        with safe_open(file, framework="pt") as content:
            return content.get_slice(stored).get_shape()

    def read(self, name: str) -> Tensor:
        file, stored = self._files[name]
        with safe_open(file, framework="pt") as content:
            return content.get_tensor(stored).float()


def _today(name: str, old_names: Mapping[str, str]) -> str:
    for old, new in old_names.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def work(job: ImportJob) -> int:
    """Writes the run; returns the exit code."""
    return in_ranks(lambda ranks: _imported(job, ranks), job.ranks)


def _imported(job: ImportJob, ranks: Ranks) -> Outcome:
    if job.check:
        missing_transformers()
    found = _read_json(job.source / "config.json")
    tokenizer = Tokenizer.load(job.source) if (job.source / "tokenizer.json").is_file() else None
    files = _Files(job.source, family_of(found).old_names)
    model = _model(found, files, tokenizer)
    pairs = _checked_pairs(job.source, model, files)
    config = _run_config(job, model)
    beside = job.output.with_name(f".{job.output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        run = RunDirectory(beside)
        _write_step(run.checkpoints, config, pairs, files, ranks.attempt)
        configuration.save(config, run.config)
        if tokenizer is not None:
            tokenizer.save(beside / "tokenizer.json")
        if job.check:
            weights = {pair.ours: _joined(pair, files) for pair in pairs}
            compare_logits(model, weights, job.source, sequence_length=config.train.sequence_length)
        beside.rename(job.output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    assert model.vocabulary_size is not None
    count = format_count(parameter_count(model, model.vocabulary_size, config.train.sequence_length))
    logger.info("%s: a %s of %s parameters, step 0 of a run", job.output, model.family.value, count)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"imported to {job.output}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a model's description: expected an object.")
    return found


def _model(found: Mapping[str, Any], files: _Files, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model, with a vocabulary that has room for the tokens that our pipeline adds to the tokenizer."""
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), model_values(found, files.names)))
    assert isinstance(model, ModelConfig)
    assert model.vocabulary_size is not None
    if tokenizer is None or tokenizer.vocabulary_size <= model.vocabulary_size:
        return model
    rows = model.unpadded_vocabulary_size or model.vocabulary_size
    return replace(model, vocabulary_size=tokenizer.vocabulary_size, unpadded_vocabulary_size=rows)


def _checked_pairs(source: Path, model: ModelConfig, files: _Files) -> list[Pair]:
    """The family's tensors under the names that the files have, each there, none left over.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; it names it.
    """
    family = FAMILIES[model.family]
    pairs = list(family.pairs(model))
    if family.prefix and not any(name.startswith(family.prefix) for name in files.names):
        pairs = [
            replace(pair, theirs=tuple(part.removeprefix(family.prefix) for part in pair.theirs)) for pair in pairs
        ]
    wanted = {part for pair in pairs for part in pair.theirs}
    missing = sorted(wanted - files.names)
    if missing:
        raise UserError(f"{source} has no tensor {missing[0]}, which a {model.family.value} of this config.json has.")
    copies = {"lm_head.weight": pairs[0].theirs[0], **family.copies} if model.tie_embeddings else family.copies
    beyond = sorted(
        name
        for name in files.names - wanted
        if not name.endswith(_BUFFERS) and not _is_copy(name, copies.get(name), files)
    )
    if beyond:
        raise UserError(f"{source} has a tensor {beyond[0]} that a {model.family.value} has not: it is not understood.")
    return pairs


def _is_copy(name: str, of: str | None, files: _Files) -> bool:
    """Whether a tensor is written out a second time, such as the output layer that is the embedding."""
    return of is not None and of in files.names and torch.equal(files.read(name), files.read(of))


def _run_config(job: ImportJob, model: ModelConfig) -> RunConfig:
    plain = RunConfig()
    length = model.positions or _CHECKED_LENGTH
    return replace(
        plain,
        run=replace(plain.run, name=job.output.name, dir=str(job.output)),
        model=model,
        train=replace(plain.train, steps=1, global_batch_size=1, sequence_length=length),
    )


def _joined(pair: Pair, files: _Files) -> Tensor:
    return pair.join([files.read(part) for part in pair.theirs])


def _shapes(pairs: list[Pair], files: _Files) -> Iterator[tuple[str, Tensor]]:
    """What each tensor of ours will be, from the headers of the files alone."""
    for pair in pairs:
        parts = [torch.empty(files.shape(part), device="meta") for part in pair.theirs]
        try:
            yield WEIGHT + pair.ours, pair.join(parts)
        except RuntimeError as error:
            raise UserError(
                f"the tensors {', '.join(pair.theirs)} have shapes that do not fit config.json: {error}."
            ) from None


def _write_step(checkpoints: Path, config: RunConfig, pairs: list[Pair], files: _Files, attempt: str) -> None:
    by_name = {WEIGHT + pair.ours: pair for pair in pairs}
    write_weights(
        checkpoints,
        0,
        dict(_shapes(pairs, files)),
        lambda name: _joined(by_name[name], files).contiguous(),
        config=config,
        layout={"imported": config.model.family.value},
        attempt=attempt,
    )
