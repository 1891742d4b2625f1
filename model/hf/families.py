"""The families that can be read from and written to Hugging Face's format: one table."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from model.config import FamilyName, ModelConfig
from model.hf import deepseek, gemma, gpt2, gpt_neox, llama
from model.hf.pairs import Pair
from model.hf.settings import Settings, read, write
from parallel.common.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family on both sides."""

    settings: Settings
    pairs: Callable[[ModelConfig], Iterator[Pair]]
    """Every tensor of a model whose vocabulary size is given."""
    prefix: str = ""
    """Begins their names, and is missing in files that hold the model without its head."""


FAMILIES: Mapping[FamilyName, Family] = {
    FamilyName.gpt2: Family(settings=gpt2.GPT2, pairs=gpt2.pairs, prefix="transformer."),
    FamilyName.llama: Family(settings=llama.LLAMA, pairs=llama.pairs),
    FamilyName.mistral: Family(settings=llama.MISTRAL, pairs=llama.pairs),
    FamilyName.mixtral: Family(settings=llama.MIXTRAL, pairs=partial(llama.pairs, names=llama.MIXTRAL_EXPERTS)),
    FamilyName.qwen2: Family(settings=llama.QWEN2, pairs=llama.pairs),
    FamilyName.qwen3: Family(settings=llama.QWEN3, pairs=llama.pairs),
    FamilyName.qwen3_moe: Family(settings=llama.QWEN3_MOE, pairs=llama.pairs),
    FamilyName.gpt_neox: Family(settings=gpt_neox.GPT_NEOX, pairs=gpt_neox.pairs),
    FamilyName.gemma2: Family(settings=gemma.GEMMA2, pairs=gemma.pairs),
    FamilyName.gemma3: Family(settings=gemma.GEMMA3, pairs=gemma.pairs),
    FamilyName.deepseek_v2: Family(settings=deepseek.DEEPSEEK_V2, pairs=deepseek.pairs),
    FamilyName.deepseek_v3: Family(settings=deepseek.DEEPSEEK_V3, pairs=deepseek.pairs),
}


def model_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """The `model:` block that a `config.json` describes.

    Raises:
        UserError: a family, key or value that is not understood; it names it.
    """
    kind = found.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"config.json has model_type {kind!r}: those that are converted are {', '.join(FAMILIES)}")
    return read(FAMILIES[FamilyName(kind)].settings, found, family=str(kind))


def config_json(config: ModelConfig, *, sequence_length: int) -> dict[str, Any]:
    """The `config.json` of a model, without what a tokenizer knows.

    Raises:
        UserError: the model has something that its family cannot say.
    """
    return write(
        FAMILIES[config.family].settings, config, model_type=config.family.value, sequence_length=sequence_length
    )
