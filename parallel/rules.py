"""What each optimizer is, as far as it matters before anything is built: which state it keeps of a parameter.

An optimizer that treats every element by itself (AdamW) may be cut anywhere: DeepSpeed's ZeRO flattens parameters and
shards them in every stage. One that looks at a whole matrix (Muon, Adafactor, anybody's own) may not: there each
parameter is stepped whole, by one rank (`parallel.whole`). Memory's arithmetic, validation and checkpoints all follow
from the one table here. Imports without torch.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from parallel.common.errors import ConfigError, Problem
from parallel.config import OptimizerConfig

Shape = tuple[int, ...]
States = Callable[[str, Shape, OptimizerConfig], Mapping[str, Shape]]
"""(name, whole shape, configuration) of a parameter -> the tensors that are kept of it between steps, with shapes."""

FIRST_MOMENT, SECOND_MOMENT = "exp_avg", "exp_avg_sq"
CODE, SCALE = "_code", "_scale"
"""Ends of the names of a state that is kept as bytes, and of what its blocks are multiplied by."""
_BLOCK, _FEWEST = 256, 4096
"""Elements that share a scale, and elements of a matrix below which nothing is gained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One optimizer."""

    title: str
    """What people call it."""
    states: States
    elementwise: bool = False
    """Whether each element's step depends on that element alone, so that a parameter may be cut anywhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What a parameter's own rules make of it; parameters of equal settings are stepped together."""

    learning_rate_factor: float
    weight_decay: float


def adamw_states(_name: str, shape: Shape, _config: OptimizerConfig) -> dict[str, Shape]:
    """Two moments of the parameter's shape."""
    return {FIRST_MOMENT: shape, SECOND_MOMENT: shape}


def eight_bit_shapes(shape: Shape) -> dict[str, Shape]:
    """Two moments of the parameter's shape, a byte each, and their scales."""
    blocks = (math.ceil(math.prod(shape) / _BLOCK),)
    moments = (FIRST_MOMENT, SECOND_MOMENT)
    return {**{f"{name}{CODE}": shape for name in moments}, **{f"{name}{SCALE}": blocks for name in moments}}


def eight_bit_states(name: str, shape: Shape, config: OptimizerConfig) -> dict[str, Shape]:
    """Bytes for large matrices, AdamW's moments elsewhere."""
    return eight_bit_shapes(shape) if is_eight_bit(name, shape, config) else adamw_states(name, shape, config)


def muon_states(name: str, shape: Shape, config: OptimizerConfig) -> dict[str, Shape]:
    """A momentum where Muon steps, AdamW's moments elsewhere."""
    return {"momentum_buffer": shape} if is_orthogonalised(name, shape, config) else adamw_states(name, shape, config)


def adafactor_states(_name: str, shape: Shape, _config: OptimizerConfig) -> dict[str, Shape]:
    """Of a matrix one number for each row and one for each column, else one for each element."""
    if len(shape) < 2:
        return {"variance": shape}
    return {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])}


RULES: dict[str, Rule] = {
    "adamw": Rule(title="AdamW", states=adamw_states, elementwise=True),
    "adamw_8bit": Rule(title="8-bit AdamW", states=eight_bit_states),
    "muon": Rule(title="Muon", states=muon_states),
    "adafactor": Rule(title="Adafactor", states=adafactor_states),
}
"""By the word in `optimizer.name`; a plugin adds its own with `parallel.torch_optimizers.register_optimizer`."""


def is_orthogonalised(name: str, shape: Shape, config: OptimizerConfig) -> bool:
    """Whether Muon steps this parameter: a matrix that no pattern of `optimizer.muon.leave_to_adamw` names."""
    return len(shape) == 2 and not any(re.search(pattern, name) for pattern in config.muon.leave_to_adamw)


def is_eight_bit(name: str, shape: Shape, config: OptimizerConfig) -> bool:
    """Whether 8-bit AdamW keeps bytes of this parameter."""
    left = any(re.search(pattern, name) for pattern in config.adamw_8bit.leave_to_adamw)
    return len(shape) == 2 and math.prod(shape) >= _FEWEST and not left


def state_words(name: str, shape: Shape, config: OptimizerConfig) -> int:
    """What is kept of a parameter between steps, in words of 4 bytes."""
    states = RULES[config.name].states(name, shape, config)
    return math.ceil(sum(math.prod(own) * (1 if kind.endswith(CODE) else 4) for kind, own in states.items()) / 4)


def setting(name: str, *, is_matrix: bool, config: OptimizerConfig, factor: float = 1.0) -> Setting:
    """The first of `optimizer.groups` whose pattern is found in the name; else no decay on vectors.

    `factor` is what the model asks the learning rate to be multiplied by; how much a step decays does not follow it.
    """
    decay = config.weight_decay if is_matrix else 0.0
    for group in config.groups:
        if re.search(group.pattern, name):
            own = decay if group.weight_decay is None else group.weight_decay
            return Setting(learning_rate_factor=group.learning_rate_factor * factor, weight_decay=own / factor)
    return Setting(learning_rate_factor=factor, weight_decay=decay / factor)


def is_frozen(name: str, config: OptimizerConfig) -> bool:
    """Whether a pattern of `optimizer.frozen` is found in the name."""
    return any(re.search(pattern, name) for pattern in config.frozen)


def check_patterns(names: Sequence[str], config: OptimizerConfig) -> None:
    """Refuses patterns that are found in none of a whole model's names: a slip there would do nothing, silently.

    Raises:
        ConfigError: with every such pattern.
    """
    patterns = [(f"optimizer.groups.{number}.pattern", group.pattern) for number, group in enumerate(config.groups)]
    patterns += [("optimizer.frozen", pattern) for pattern in config.frozen]
    legal = f"a regular expression that is found in a parameter's name, such as {names[0]}" if names else ""
    unused = [(key, found) for key, found in patterns if not any(re.search(found, name) for name in names)]
    if unused:
        raise ConfigError([Problem(key=key, got=found, legal=legal) for key, found in unused])
