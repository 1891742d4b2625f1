"""What a layout needs and brings: memory, time, rate, utilisation and price together. Imports without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from launcher.plan import memory, seconds
from launcher.plan.setting import Setting


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one layout."""

    setting: Setting
    seconds: Mapping[str, float]
    """Of a step, by kind (`seconds.KINDS`)."""
    tokens_per_second: float
    mfu_causal: float
    mfu_full: float

    @cached_property
    def bytes(self) -> Mapping[str, int]:
        """Of the fullest rank, by kind (`memory.KINDS`)."""
        return memory.peak_bytes(self.setting)

    @property
    def bytes_total(self) -> int:
        return sum(self.bytes.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    def days(self, tokens: int) -> float:
        """For so many tokens, without a stop."""
        return tokens / self.tokens_per_second / 86400


def estimate(setting: Setting) -> Estimate:
    """Everything about a legal layout."""
    spent = seconds.step_seconds(setting)
    rate = setting.tokens / sum(spent.values())
    peak = setting.hardware.peak(setting.precision.value) * setting.ranks
    return Estimate(
        setting=setting,
        seconds=spent,
        tokens_per_second=rate,
        mfu_causal=rate * setting.facts.flops[True] / peak,
        mfu_full=rate * setting.facts.flops[False] / peak,
    )
