"""A checkpoint as a model of `transformers` in memory, float32: what an export would give, without its files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tokenizer import VOCABULARY_MULTIPLE, Tokenizer
from launcher.config import RunConfig
from launcher.conversion.check import KERNEL, transformers
from launcher.conversion.export import Weights, check_names, described_model, needed_tokenizer, theirs
from launcher.places import Checkpoint
from model import lora, mup
from model.config import ModelConfig
from model.hf.families import config_json, pairs_of
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError


def needs_transformers(what: str) -> None:
    """Refuses what only `transformers` does where it is not installed.

    Raises:
        UserError: it is not.
    """
    if not transformers.is_installed:
        raise UserError(f"{what} needs transformers: pip install 'bloomery[hf]'.")


def check_known(config: RunConfig) -> None:
    """Refuses a run whose model cannot be one of `transformers`, before there are any weights.

    Raises:
        UserError: it says why.
    """
    needs_transformers("generating and filling gaps")
    plain = lora.without(mup.without(config.model))
    model = replace(plain, vocabulary_size=plain.vocabulary_size or VOCABULARY_MULTIPLE)
    pairs_of(model)
    config_json(model, sequence_length=config.train.sequence_length)


def with_tokenizer(checkpoint: Checkpoint, what: str) -> tuple[RunConfig, Tokenizer, Any]:
    """A checkpoint's run, its tokenizer and its model, for `what`, which is named where `transformers` is missing.

    Raises:
        UserError: `transformers` is not installed, or the checkpoint has no tokenizer or no such model.
    """
    needs_transformers(what)
    config = checkpoint.config()
    return config, needed_tokenizer(checkpoint.run.path, config), in_memory(checkpoint)


def in_memory(checkpoint: Checkpoint) -> Any:
    """The model in evaluation mode, on the accelerator where there is one.

    Raises:
        UserError: the checkpoint is damaged, or its model is none that `transformers` knows.
    """
    return evaluated(checkpoint.config(), Weights(StoredTensors(checkpoint.path)), place=checkpoint.path)


def evaluated(config: RunConfig, tensors: Weights, *, place: Path) -> Any:
    """The same of the weights of a run, which `place` names in what is said of them."""
    model = described_model(config, tensors)
    check_names(place, tensors, pairs_of(model))
    made = in_transformers(config, model, tensors)
    return made.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def in_transformers(config: RunConfig, model: ModelConfig, tensors: Weights) -> Any:
    """The model of `transformers` with weights whose names were checked."""
    pairs = pairs_of(model)
    said = config_json(model, sequence_length=config.train.sequence_length)
    found = transformers.AutoConfig.for_model(**said)
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, said["architectures"][0]).from_pretrained(
        None,
        config=found,
        state_dict=dict(theirs(pairs, tensors, torch.float32)),
        dtype=torch.float32,
        attn_implementation=KERNEL,
    )
