"""What parts of a `config.json` cannot be said key by key: rotary positions and layers of two kinds.

A `Reading` takes its keys out of what is left of a file, gives our fields for them, and writes them back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig, RopeScaling, RopeScalingConfig
from model.rope import ntk_base
from parallel.common.errors import UserError

Left = dict[str, Any]
"""Keys of a `config.json` that nobody has read yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Some of their keys and some of our fields that say the same."""

    ours: frozenset[str]
    """The fields that it gives and writes."""
    read: Callable[[Left, Mapping[str, Any], str], Mapping[str, Any]]
    """Takes its keys, gives fields; told the values that are known already, and the family for messages."""
    write: Callable[[ModelConfig, int], Mapping[str, Any]]
    """From a model and train.sequence_length."""


_SCALING_KEYS: Mapping[RopeScaling, Mapping[str, str]] = {
    RopeScaling.linear: {"factor": "factor"},
    RopeScaling.ntk: {"factor": "factor"},
    RopeScaling.llama3: {
        "factor": "factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
        "original_max_position_embeddings": "original_positions",
    },
    RopeScaling.yarn: {
        "factor": "factor",
        "original_max_position_embeddings": "original_positions",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    },
}
_NAMES = {
    "dynamic": RopeScaling.ntk,
    "linear": RopeScaling.linear,
    "llama3": RopeScaling.llama3,
    "yarn": RopeScaling.yarn,
}
_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def _read_scaling(said: Mapping[str, Any], values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """`rope_scaling` from a dict that may hold the base too."""
    scaling = {key: value for key, value in said.items() if key not in ("rope_theta", "partial_rotary_factor")}
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    if kind == "default" and not scaling:
        return {}
    keys = _SCALING_KEYS[_NAMES[kind]] if kind in _NAMES else {}
    found = {key: value for key, value in scaling.items() if value is not None}
    if kind not in _NAMES or not set(keys) & _REQUIRED <= found.keys() <= keys.keys():
        legal = ", ".join(f"{name!r} and {sorted(_SCALING_KEYS[each])}" for name, each in _NAMES.items())
        raise UserError(
            f"config.json stretches rotary positions by {kind!r} with {sorted(found)}: a {family} is converted with "
            f"'default', or with {legal}"
        )
    read = {"kind": _NAMES[kind].value, **{keys[key]: value for key, value in found.items()}}
    if _NAMES[kind] is RopeScaling.ntk:
        if "positions" not in values:
            raise UserError("config.json stretches rotary positions by 'dynamic' and has no max_position_embeddings")
        read["original_positions"] = values["positions"]
    return {"rope_scaling": read}


def _read_rope(left: Left, values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """`rope_parameters`, or `rope_theta` and `rope_scaling` as older files have them."""
    said = left.pop("rope_parameters", None) or {}
    base = said.get("rope_theta", left.pop("rope_theta", None))
    scaling = said or left.get("rope_scaling") or {}
    left.pop("rope_scaling", None)
    read = {} if base is None else {"rope_base": float(base)}
    return read | _read_scaling(scaling, values, family)


def _write_rope(config: ModelConfig, sequence_length: int) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling.kind is RopeScaling.ntk and scaling.factor > 1 and sequence_length > scaling.original_positions:
        # Theirs would take another base for every length; ours is the one of the length that was trained.
        base = ntk_base(config.rope_base, scaling, channels=config.rotary_channels, sequence_length=sequence_length)
        return {"rope_parameters": {"rope_theta": base, "rope_type": "default"}}
    return {"rope_parameters": {"rope_theta": config.rope_base, **_written_scaling(scaling)}}


def _written_scaling(scaling: RopeScalingConfig) -> dict[str, Any]:
    if scaling.factor == 1:
        return {"rope_type": "default"}
    name = next(name for name, kind in _NAMES.items() if kind is scaling.kind)
    written = {theirs: getattr(scaling, ours) for theirs, ours in _SCALING_KEYS[scaling.kind].items()}
    return {"rope_type": name, **{key: value for key, value in written.items() if value is not None}}


ROPE = Reading(ours=frozenset({"rope_base", "rope_scaling"}), read=_read_rope, write=_write_rope)


def _read_partial_rope(left: Left, values: Mapping[str, Any], family: str) -> dict[str, Any]:
    said = left.get("rope_parameters") or {}
    share = said.get("partial_rotary_factor", left.pop("rotary_pct", 0.25))
    base = left.pop("rotary_emb_base", None)
    if base is not None:
        left.setdefault("rope_theta", base)
    return {**_read_rope(left, values, family), "rope_share": share}


def _write_partial_rope(config: ModelConfig, sequence_length: int) -> dict[str, Any]:
    written = _write_rope(config, sequence_length)
    return {"rope_parameters": {**written["rope_parameters"], "partial_rotary_factor": config.rope_share}}


PARTIAL_ROPE = Reading(ours=ROPE.ours | {"rope_share"}, read=_read_partial_rope, write=_write_partial_rope)
"""GPT-NeoX: a quarter of each head turns."""


def _read_two_ropes(left: Left, values: Mapping[str, Any], family: str) -> dict[str, Any]:
    said = left.pop("rope_parameters", None)
    local = left.pop("rope_local_base_freq", 10_000.0)
    if said is None:
        left.setdefault("rope_theta", 1_000_000.0)
        return {**_read_rope(left, values, family), "rope_local_base": float(local)}
    kinds = {"full_attention": {"rope_theta": 1_000_000.0}, "sliding_attention": {"rope_theta": local}}
    whole, window = ({**plain, **(said.get(kind) or {})} for kind, plain in kinds.items())
    if _read_scaling(window, values, family):
        raise UserError(
            f"config.json stretches the rotary positions of windows: {window}, which no {family} of ours does"
        )
    return {**_read_rope({"rope_parameters": whole}, values, family), "rope_local_base": float(window["rope_theta"])}


def _write_two_ropes(config: ModelConfig, sequence_length: int) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "full_attention": _write_rope(config, sequence_length)["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_base},
        }
    }


TWO_ROPES = Reading(ours=ROPE.ours | {"rope_local_base"}, read=_read_two_ropes, write=_write_two_ropes)
"""Gemma 3: a base for layers with a window, and one for the others."""

_WHOLE, _WINDOW = "full_attention", "sliding_attention"


def alternating_windows(every: int) -> Reading:
    """`layer_types`, or an older file's pattern; `every` where neither is there."""

    def read(left: Left, values: Mapping[str, Any], family: str) -> dict[str, Any]:
        pattern = [left.pop(key, None) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
        chosen = next((number for number in pattern if number is not None), every)
        kinds = left.pop("layer_types", None)
        if kinds is None:
            return {"full_attention_every": chosen}
        chosen = kinds.index(_WHOLE) + 1 if _WHOLE in kinds else max(chosen, len(kinds) + 1)
        if kinds != _kinds(len(kinds), chosen):
            raise UserError(
                f"config.json says layer_types = {kinds}: a {family} is converted where every n-th layer is {_WHOLE!r}"
            )
        return {"full_attention_every": chosen}

    def write(config: ModelConfig, _: int) -> dict[str, Any]:
        assert config.full_attention_every is not None
        return {"layer_types": _kinds(config.layers, config.full_attention_every)}

    return Reading(ours=frozenset({"full_attention_every"}), read=read, write=write)


def _kinds(layers: int, every: int) -> list[str]:
    return [_WINDOW if (layer + 1) % every else _WHOLE for layer in range(layers)]
