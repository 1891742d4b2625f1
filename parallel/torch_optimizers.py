"""The torch optimizers behind each name, for parameters that are stepped whole.

A builder gets a rank's whole parameters and gives one or more torch optimizers that share them out. It need not know
ranks, layouts or precisions: `parallel.whole` gives it whole float32 masters and whole gradients.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.config import OptimizerConfig
from parallel.eight_bit import AdamW8bit
from parallel.muon import Muon
from parallel.rules import RULES, Rule, Setting, States, is_eight_bit, is_orthogonalised


@dataclass(frozen=True, kw_only=True, slots=True)
class Stepped:
    """A parameter as its optimizer sees it."""

    name: str
    """Global name; the experts of a layer share one."""
    master: Tensor
    """Whole, float32 (float64 in float64)."""
    setting: Setting


Builder = Callable[[Sequence[Stepped], OptimizerConfig], Sequence[torch.optim.Optimizer]]


def groups(parameters: Sequence[Stepped]) -> list[dict[str, Any]]:
    """Parameter groups as torch's optimizers take them, of equal `weight_decay` and `learning_rate_factor`.

    The learning rate of every group is set before each step, times its factor.
    """
    found: dict[Setting, list[Tensor]] = {}
    for parameter in parameters:
        found.setdefault(parameter.setting, []).append(parameter.master)
    return [{"params": members, **asdict(setting)} for setting, members in found.items()]


def _adamw(parameters: Sequence[Stepped], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    if not parameters:
        return []
    rate, betas = config.learning_rate, config.betas
    return [torch.optim.AdamW(groups(parameters), lr=rate, betas=betas, eps=config.eps, fused=True)]


def _adamw_8bit(parameters: Sequence[Stepped], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    large = [each for each in parameters if is_eight_bit(each.name, tuple(each.master.shape), config)]
    others = [each for each in parameters if not is_eight_bit(each.name, tuple(each.master.shape), config)]
    return [*([AdamW8bit(groups(large), config=config)] if large else []), *_adamw(others, config)]


def _muon(parameters: Sequence[Stepped], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    matrices = [each for each in parameters if is_orthogonalised(each.name, tuple(each.master.shape), config)]
    others = [each for each in parameters if not is_orthogonalised(each.name, tuple(each.master.shape), config)]
    return [*([Muon(groups(matrices), config=config.muon)] if matrices else []), *_adamw(others, config)]


def _adafactor(parameters: Sequence[Stepped], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    own = config.adafactor
    return [
        torch.optim.Adafactor(
            groups(parameters),
            lr=config.learning_rate,
            beta2_decay=own.decay,
            eps=(None, own.min_scale),
            d=own.clip,
            foreach=False,
        )
    ]


BUILDERS: dict[str, Builder] = {"adamw_8bit": _adamw_8bit, "muon": _muon, "adafactor": _adafactor}
"""By the word in `optimizer.name`; what is elementwise is not here (`parallel.optimizer`)."""


def register_optimizer(name: str, build: Builder, *, states: States | Sequence[str], title: str | None = None) -> None:
    """Makes `optimizer.name=NAME` mean an optimizer of your own, in every layout at ZeRO stages 0 and 1.

    Args:
        name: the word in the configuration.
        build: torch optimizers over whole parameters; `groups` makes their parameter groups, and `config.options` holds
            the user's own settings.
        states: which tensors it keeps in `optimizer.state` of a parameter beside `step`: their names where each has the
            parameter's shape, else a function of (name, shape, configuration) that gives {name: shape}.
        title: what people call it.

    Raises:
        ValueError: the name is taken.
    """
    if name in RULES:
        raise ValueError(f"there is an optimizer called {name} already")

    def same_shape(_name: str, shape: tuple[int, ...], _config: OptimizerConfig) -> Mapping[str, tuple[int, ...]]:
        assert not callable(states)
        return dict.fromkeys(states, shape)

    RULES[name] = Rule(title=title or name, states=states if callable(states) else same_shape)
    BUILDERS[name] = build
