"""The rules of the optimizer: names that exist, patterns that are regular expressions, numbers that make sense.

That a pattern fits some parameter is found at assembly, where there are parameters. Imports without torch.
"""

import difflib
import re
from collections.abc import Iterator

from launcher.config import RunConfig
from parallel.common.errors import Problem
from parallel.common.lazy import Lazy
from parallel.config import OptimizerConfig
from parallel.rules import RULES

BITSANDBYTES = Lazy("bitsandbytes")


def optimizer_problems(config: RunConfig) -> Iterator[Problem]:
    """Everything about `optimizer` that is wrong whatever the model and the layout are."""
    own = config.optimizer
    if own.name not in RULES:
        near = difflib.get_close_matches(own.name, RULES, n=1)
        legal = (
            f"{near[0]}, if that was meant" if near else f"one of {', '.join(RULES)}, or one that a plugin registers"
        )
        yield Problem(key="optimizer.name", got=own.name, legal=legal)
    yield from _numbers(own)
    for number, group in enumerate(own.groups):
        key = f"optimizer.groups.{number}"
        yield from _pattern(f"{key}.pattern", group.pattern)
        if not group.learning_rate_factor >= 0:
            yield Problem(key=f"{key}.learning_rate_factor", got=group.learning_rate_factor, legal="0 or more")
        if not (group.weight_decay or 0.0) >= 0:
            yield Problem(key=f"{key}.weight_decay", got=group.weight_decay, legal="0 or more, or null")
    for pattern in own.frozen:
        yield from _pattern("optimizer.frozen", pattern)
    for pattern in own.adamw_8bit.leave_to_adamw:
        yield from _pattern("optimizer.adamw_8bit.leave_to_adamw", pattern)
    if own.name == "adamw_8bit" and not BITSANDBYTES.is_installed:
        legal = "adamw, or this with bitsandbytes installed (the extra bnb: pip install 'bloomery[bnb]')"
        yield Problem(key="optimizer.name", got=own.name, legal=legal)
    for pattern in own.muon.leave_to_adamw:
        yield from _pattern("optimizer.muon.leave_to_adamw", pattern)
    if own.options and own.name in ("adamw", "adamw_8bit", "muon", "adafactor"):
        legal = f"empty with optimizer.name={own.name}: options are for the optimizer of a plugin"
        yield Problem(key="optimizer.options", got=dict(own.options), legal=legal)


def _numbers(own: OptimizerConfig) -> Iterator[Problem]:
    for beta in own.betas:
        if not 0 <= beta < 1:
            yield Problem(key="optimizer.betas", got=list(own.betas), legal="numbers from 0 to below 1")
    if not 0 <= own.muon.momentum < 1:
        yield Problem(key="optimizer.muon.momentum", got=own.muon.momentum, legal="a number from 0 to below 1")
    if not own.adafactor.decay <= 0:
        legal = "0 or less: the exponent of the step"
        yield Problem(key="optimizer.adafactor.decay", got=own.adafactor.decay, legal=legal)
    if own.average_decay is not None and not 0 < own.average_decay < 1:
        yield Problem(key="optimizer.average_decay", got=own.average_decay, legal="a number between 0 and 1, or null")


def _pattern(key: str, pattern: str) -> Iterator[Problem]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield Problem(key=key, got=pattern, legal=f"a regular expression: {error}")
