"""Models whose tensors have the names of `transformers`: its own safetensors, and checkpoints of DeepSpeed.

What trains under plain DeepSpeed (`transformers`' Trainer, Accelerate, a loop of one's own) is such a model: the names
in its ZeRO checkpoint are those of `transformers`, and the config.json says what they mean.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from data_pipeline.tokenizer import Tokenizer
from launcher.conversion.check import described, pretrained
from launcher.conversion.sources import Foreign, SafetensorsFiles, Source, without_prefix
from model.config import ModelConfig
from model.hf.families import FAMILIES, family_of, model_values, pairs_of
from model.hf.heads import read_labels
from model.hf.pairs import Pair
from parallel.checkpoint.zero_files import ZeroFiles
from parallel.common.errors import UserError

_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of names of tensors that are no weights: masks and tables that older files hold."""


def open_hugging_face(directory: Path) -> Foreign:
    """A directory with config.json and safetensors.

    Raises:
        UserError: something is missing, damaged or not understood; it names it.
    """
    config = directory / "config.json"
    found = _understood(directory, config, SafetensorsFiles(directory, family_of(_read_json(config)).old_names))
    return replace(found, reference=partial(pretrained, directory, found.model))


def open_deepspeed(path: Path, config: Path) -> Foreign:
    """A checkpoint of ZeRO's, of the model that a config.json describes.

    Raises:
        UserError: something is missing, damaged or not understood; it names it.
    """
    source = ZeroFiles(path)
    found = _understood(source.place, config, source)
    return replace(
        found, reference=lambda: described(config, found.model, {name: source.read(name) for name in source.names})
    )


def _understood(place: Path, config: Path, source: Source) -> Foreign:
    tokenizer = Tokenizer.load(config.parent) if (config.parent / "tokenizer.json").is_file() else None
    found = _read_json(config)
    model = _model(found, source, tokenizer)
    return Foreign(
        source=source,
        model=model,
        pairs=_checked_pairs(place, model, source),
        labels=read_labels(found) if model.classes.number else (),
        tokenizer=tokenizer,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a model's description: expected an object.")
    return found


def _model(found: Mapping[str, Any], source: Source, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model, with a vocabulary that has room for the tokens that our pipeline adds to the tokenizer."""
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), model_values(found, source.names)))
    assert isinstance(model, ModelConfig)
    assert model.vocabulary_size is not None
    if tokenizer is None or tokenizer.vocabulary_size <= model.vocabulary_size:
        return model
    rows = model.unpadded_vocabulary_size or model.vocabulary_size
    return replace(model, vocabulary_size=tokenizer.vocabulary_size, unpadded_vocabulary_size=rows)


def _checked_pairs(place: Path, model: ModelConfig, source: Source) -> list[Pair]:
    """The family's tensors under the names that the files have, each there, none left over.

    Raises:
        UserError: a tensor is missing, unknown or of another shape; it names it.
    """
    family = FAMILIES[model.family]
    pairs = pairs_of(model)
    if family.prefix and not any(name.startswith(family.prefix) for name in source.names):
        pairs = without_prefix(pairs, family.prefix)
    wanted = {part for pair in pairs for part in pair.theirs}
    missing = sorted(wanted - source.names)
    if missing:
        raise UserError(f"{place} has no tensor {missing[0]}, which a {model.family} of this config.json has.")
    copies = {"lm_head.weight": pairs[0].theirs[0], **family.copies} if model.tie_embeddings else family.copies
    beyond = sorted(
        name
        for name in source.names - wanted
        if not name.endswith(_BUFFERS) and not _is_copy(name, copies.get(name), source)
    )
    if beyond:
        raise UserError(f"{place} has a tensor {beyond[0]} that a {model.family} has not: it is not understood.")
    return pairs


def _is_copy(name: str, of: str | None, source: Source) -> bool:
    """Whether a tensor is written out a second time, such as the output layer that is the embedding."""
    return of is not None and of in source.names and torch.equal(source.read(name), source.read(of))
