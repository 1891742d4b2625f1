"""The families that can be read from and written to Hugging Face's format: one table.

With `model.classes` a head for classes stands in place of what predicts tokens (`model.hf.heads`), in any family that
has such a class in `transformers`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from model.config import ClassesConfig, FamilyName, ModelConfig
from model.families import begins_anew
from model.hf import bert, deepseek, gemma, gpt2, gpt_neox, heads, llama, t5
from model.hf.heads import ClassHead, ClassHeads
from model.hf.pairs import Pair
from model.hf.settings import Settings, read, write
from parallel.common.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family on both sides."""

    settings: Settings
    pairs: Callable[[ModelConfig], Iterator[Pair]]
    """Every tensor of a model that predicts tokens, whose vocabulary size is given."""
    heads: ClassHeads = field(default_factory=dict)
    """For classes in place of that; by default there are none."""
    prefix: str = ""
    """Begins their names, and is missing in files that hold the model without its head."""
    from_names: Callable[[Collection[str]], Mapping[str, Any]] = lambda _: {}
    """What the names of the tensors say of the model and its config.json does not."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Names under which a file may hold a tensor again that it has under another one."""
    old_names: Mapping[str, str] = field(default_factory=dict)
    """Ends of names in old files, and what they are today."""


FAMILIES: dict[str, Family] = {
    FamilyName.gpt2: Family(
        settings=gpt2.GPT2, pairs=gpt2.pairs, heads=heads.causal("GPT2", tokens="classifier"), prefix="transformer."
    ),
    FamilyName.llama: Family(settings=llama.LLAMA, pairs=llama.pairs, heads=heads.causal("Llama")),
    FamilyName.mistral: Family(settings=llama.MISTRAL, pairs=llama.pairs, heads=heads.causal("Mistral")),
    FamilyName.mixtral: Family(
        settings=llama.MIXTRAL,
        pairs=partial(llama.pairs, names=llama.MIXTRAL_EXPERTS),
        heads=heads.causal("Mixtral"),
    ),
    FamilyName.qwen2: Family(settings=llama.QWEN2, pairs=llama.pairs, heads=heads.causal("Qwen2")),
    FamilyName.qwen3: Family(settings=llama.QWEN3, pairs=llama.pairs, heads=heads.causal("Qwen3")),
    FamilyName.qwen3_moe: Family(settings=llama.QWEN3_MOE, pairs=llama.pairs, heads=heads.causal("Qwen3Moe")),
    FamilyName.gpt_neox: Family(
        settings=gpt_neox.GPT_NEOX, pairs=gpt_neox.pairs, heads=heads.causal("GPTNeoX", tokens="classifier")
    ),
    FamilyName.gemma2: Family(settings=gemma.GEMMA2, pairs=gemma.pairs, heads=heads.causal("Gemma2")),
    FamilyName.gemma3: Family(settings=gemma.GEMMA3, pairs=gemma.pairs, heads=heads.causal("Gemma3Text", tokens=None)),
    FamilyName.deepseek_v2: Family(
        settings=deepseek.DEEPSEEK_V2, pairs=deepseek.pairs, heads=heads.causal("DeepseekV2", tokens=None)
    ),
    FamilyName.deepseek_v3: Family(
        settings=deepseek.DEEPSEEK_V3, pairs=deepseek.pairs, heads=heads.causal("DeepseekV3")
    ),
    FamilyName.bert: Family(
        settings=bert.BERT,
        pairs=bert.pairs,
        heads=heads.BERT,
        from_names=bert.from_names,
        copies=bert.COPIES,
        old_names=bert.OLD_NAMES,
    ),
    FamilyName.t5: Family(settings=t5.T5, pairs=t5.pairs, copies=t5.COPIES),
}

_HYBRIDS: Mapping[str, str] = {
    **dict.fromkeys(("bamba", "falcon_h1", "jamba", "mamba", "mamba2", "nemotron_h", "zamba", "zamba2"), "Mamba"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), "gated delta rule (GDN)"),
}
"""Models with layers that are no attention, and which."""


def family_of(found: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names.

    Raises:
        UserError: it is not one that is converted.
    """
    kind = found.get("model_type")
    if kind is not None and kind in _HYBRIDS:
        raise UserError(
            f"config.json has model_type {kind!r}, whose layers are partly {_HYBRIDS[kind]}: they need Transformer "
            "Engine and CUDA kernels (mamba-ssm, causal-conv1d, flash-linear-attention), which are not used here yet"
        )
    if kind not in FAMILIES:
        raise UserError(f"config.json has model_type {kind!r}: those that are converted are {', '.join(FAMILIES)}")
    return FAMILIES[str(kind)]


def converted(config: ModelConfig) -> Family:
    """How a model's family is converted.

    Raises:
        UserError: it is not.
    """
    if config.family not in FAMILIES:
        raise UserError(f"a {config.family} has no names in Hugging Face's format: its plugin registered none")
    return FAMILIES[config.family]


def pairs_of(config: ModelConfig) -> list[Pair]:
    """Every tensor of a model whose vocabulary size is given.

    Raises:
        UserError: its family is not converted, or has no such head for classes.
    """
    family = converted(config)
    found = list(family.pairs(config))
    if not config.classes.number:
        return found
    return [*(pair for pair in found if not begins_anew(config, pair.ours)), *_head(family, config).pairs()]


def _head(family: Family, config: ModelConfig) -> ClassHead:
    if config.classes.of not in family.heads:
        raise UserError(f"a {config.family} has no class in transformers that tells classes of {config.classes.of}")
    return family.heads[config.classes.of]


def model_values(found: Mapping[str, Any], names: Collection[str] = ()) -> dict[str, Any]:
    """The `model:` block that a `config.json` describes, with what the names of the tensors say besides.

    Raises:
        UserError: a family, key or value that is not understood; it names it.
    """
    family = family_of(found)
    values = read(family.settings, found, family=str(found["model_type"])) | dict(family.from_names(names))
    for of, head in family.heads.items():
        if head.architecture in (found.get("architectures") or ()):
            values["classes"] = {"number": len(heads.read_labels(found)), "of": of.value}
    return values


def config_json(config: ModelConfig, *, sequence_length: int, labels: tuple[str, ...] = ()) -> dict[str, Any]:
    """The `config.json` of a model, without what a tokenizer knows.

    Args:
        config: the model.
        sequence_length: of training.
        labels: names of the classes by number; without them they are called as `transformers` does.

    Raises:
        UserError: the model has something that its family cannot say.
    """
    family = converted(config)
    plain = replace(config, classes=ClassesConfig())
    written = write(family.settings, plain, model_type=config.family, sequence_length=sequence_length)
    if not config.classes.number:
        return written
    labels = labels or heads.unnamed(config.classes.number)
    return written | {"architectures": [_head(family, config).architecture], **heads.written_labels(labels)}
