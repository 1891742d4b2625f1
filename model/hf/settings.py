"""What a `config.json` says, as a `ModelConfig`, and back: nothing in it is passed over in silence.

Each key is one of four: it is a field of ours, it must have one of the given values, it has a reading of its own
(rotary positions, which changed their place between versions), or it does not touch what the model computes. Any other
key is a mistake that names it; so a model with something that ours lacks is refused, not converted wrongly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import LatentConfig, ModelConfig, MoeConfig
from model.hf.readings import ROPE, Reading
from parallel.common.errors import UserError

_VOCABULARY_MULTIPLE = 128
_NO_MATTER = frozenset(
    {
        "_name_or_path", "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "eos_token_id", "id2label", "is_decoder", "is_encoder_decoder",
        "label2id", "max_window_layers", "model_type", "num_labels", "output_attentions",
        "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
        "router_aux_loss_coef", "router_jitter_noise", "task_specific_params", "torch_dtype", "transformers_version",
        "use_cache",
    }
)  # fmt: skip
"""Training, generation and bookkeeping: neither shapes nor logits depend on them."""


_UNSAID = frozenset(
    {
        "family", "vocabulary_size", "unpadded_vocabulary_size", "initial_std", "dropout", "positions", "moe", "latent",
        "moe.load_balance_loss", "moe.z_loss", "moe.dispatcher", "moe.bias_loss",
    }
)  # fmt: skip
"""Our fields that a `config.json` need not say: logits do not depend on them, or other keys hold them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One family's `config.json`."""

    architecture: str | Callable[[ModelConfig], str]
    """Name of the class in `transformers`."""
    fields: Mapping[str, str]
    """Their key to our field; `moe.experts` is a field of a field."""
    constants: Mapping[str, Any]
    """Our field to the value that it has in this family, where that is not our default."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Their key to what it means to be absent."""
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    """Our field to its value where they leave it open, from the other values."""
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Their key to the values that we can convert; the first is what an export says."""
    no_matter: frozenset[str] = frozenset()
    """Keys of this family alone that change nothing."""
    readings: tuple[Reading, ...] = (ROPE,)
    """What cannot be said key by key."""
    said_by_names: tuple[str, ...] = ()
    """Our fields that only the tensors' names tell."""


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *above, last = name.split(".")
    for part in above:
        values = values.setdefault(part, {})
    values[last] = value


def _get(config: ModelConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def read(settings: Settings, found: Mapping[str, Any], *, family: str) -> dict[str, Any]:
    """The values of a `ModelConfig` from a `config.json`, nested as the configuration tree is.

    Raises:
        UserError: a key or a value that this family's conversion does not understand; it names it.
    """
    left = {key: value for key, value in {**settings.defaults, **found}.items() if key not in _NO_MATTER}
    values: dict[str, Any] = {"family": family}
    for name, value in settings.constants.items():
        _set(values, name, value)
    for key, name in settings.fields.items():
        if key in left and (value := left.pop(key)) is not None:
            _set(values, name, value)
    for name, derive in settings.derived.items():
        values.setdefault(name, derive(values))
    for key, legal in settings.required.items():
        if (value := left.pop(key, legal[0])) not in legal:
            raise UserError(f"config.json says {key} = {value!r}: a {family} is converted with {_either(legal)} only")
    for reading in settings.readings:
        for name, value in reading.read(left, values, family).items():
            _set(values, name, value)
    unknown = sorted(key for key, value in left.items() if key not in settings.no_matter and value is not None)
    if unknown:
        named = ", ".join(f"{key} = {left[key]!r}" for key in unknown)
        raise UserError(f"config.json says {named}, which the conversion of a {family} does not understand")
    rows = values.pop("vocabulary_size")
    padded = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return values | {"vocabulary_size": padded, "unpadded_vocabulary_size": rows if rows != padded else None}


def _either(legal: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in legal)


def write(settings: Settings, config: ModelConfig, *, model_type: str, sequence_length: int) -> dict[str, Any]:
    """The `config.json` of a model, without what a tokenizer knows.

    Raises:
        UserError: the model has something that this family cannot say; it names it.
    """
    _check_said(settings, config, model_type)
    named = settings.architecture
    architecture = named if isinstance(named, str) else named(config)
    written: dict[str, Any] = {"architectures": [architecture], "model_type": model_type}
    written |= {key: legal[0] for key, legal in settings.required.items()}
    spelt_out = {  # what ours may leave open
        "kv_heads": config.kv_heads or config.heads,
        "head_size": config.head_size or config.hidden_size // config.heads,
        "positions": config.positions or sequence_length,
        "vocabulary_size": config.unpadded_vocabulary_size or config.vocabulary_size,
        "moe.ffn_hidden_size": config.moe.ffn_hidden_size or config.ffn_hidden_size,
        "query_pre_attention_scalar": config.query_pre_attention_scalar
        or config.head_size
        or config.hidden_size // config.heads,
    }
    for key, name in settings.fields.items():
        written[key] = spelt_out[name] if name in spelt_out else _get(config, name)
    for reading in settings.readings:
        written |= reading.write(config, sequence_length)
    return written


def _check_said(settings: Settings, config: ModelConfig, model_type: str) -> None:
    """Refuses a model of which this family's `config.json` would say less than it is."""
    for name, value in settings.constants.items():
        if _get(config, name) != value:
            raise UserError(f"a {model_type} has model.{name} = {value}, and this model {_get(config, name)}")
    if config.moe.experts and "moe.experts" not in settings.fields.values():
        raise UserError(f"a {model_type} has no experts: export it as one that has, such as mixtral")
    plain = ModelConfig(layers=1, hidden_size=1, heads=1, ffn_hidden_size=1)
    if config.kv_heads == config.heads:  # what is left open says the same
        config = replace(config, kv_heads=None)
    names = [*ModelConfig.__slots__, *(f"moe.{name}" for name in MoeConfig.__slots__ if config.moe.experts)]
    names += [f"latent.{name}" for name in LatentConfig.__slots__ if config.latent.kv_rank is not None]
    by_key = {*settings.fields.values(), *settings.constants, *settings.said_by_names}
    said = by_key | {name for each in settings.readings for name in each.ours}
    for name in sorted({*names} - said - _UNSAID):
        if _get(config, name) != _get(plain, name):
            raise UserError(f"a {model_type} has no model.{name} = {_get(config, name)}: export it as another family")
