"""What a run with adapters may begin with: a beginning that would make other weights of them, silently, is refused.

A checkpoint holds the whole model, adapters and frozen matrices: any verb, layout and machine reads it by itself, and
no base model has to be found again. Imports without torch.
"""

from pathlib import Path
from typing import Any

from launcher.config import RunConfig, to_dict
from parallel.checkpoint.manifest import Manifest
from parallel.common.errors import ConfigError, Problem, UserError
from parallel.config import LoadParts

_SAME = ("rank", "alpha", "targets")
"""What a stored adapter means depends on these."""


def check_adapters(config: RunConfig, origin: Path | None) -> None:
    """Holds `model.lora` of a new run against the checkpoint that it begins with.

    Raises:
        UserError: there is none, or its adapters are not those of the configuration.
    """
    lora = to_dict(config)["model"]["lora"]
    if origin is None:
        if lora["rank"] is not None:
            legal = "a checkpoint with model.lora.rank: adapters of random weights, which stay as they are, are no use"
            raise ConfigError([Problem(key="checkpoint.load", got=None, legal=legal)])
        return
    stored: dict[str, Any] = Manifest.read(origin).config.get("model", {}).get("lora") or {}
    if stored.get("rank") is None:
        if lora["rank"] is not None and config.checkpoint.load_parts is not LoadParts.weights:
            legal, got = f"weights: {origin} has no adapters", config.checkpoint.load_parts.value
            raise ConfigError([Problem(key="checkpoint.load_parts", got=got, legal=legal)])
        return
    if lora["rank"] is None:
        raise UserError(
            f"{origin} holds adapters, and model.lora.rank is null: give it model.lora as they have it, or export the "
            "checkpoint, which merges them, and import the result."
        )
    problems = [
        Problem(key=f"model.lora.{name}", got=lora[name], legal=f"{stored.get(name)!r}, as {origin} has it")
        for name in _SAME
        if lora[name] != stored.get(name)
    ]
    if problems:
        raise ConfigError(problems)
