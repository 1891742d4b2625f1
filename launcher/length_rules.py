"""The rules of a run's length: how many steps, of how many samples, and a schedule that fits into them.

Imports without torch.
"""

from collections.abc import Iterator

from launcher.config import RunConfig
from launcher.length import total_steps
from parallel.common.errors import Problem
from parallel.common.units import parse_count
from parallel.config import ScheduleName


def length_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with the steps, the tokens, the ramp of batch sizes, or the schedule that they are to hold."""
    train, schedule = config.train, config.optimizer.schedule
    if (train.steps is None) == (train.tokens is None):
        got = None if train.steps is None else train.steps
        yield Problem(key="train.steps", got=got, legal="exactly one of train.steps and train.tokens")
        return
    found = [*_tokens("train.tokens", train.tokens), *_ramp(config)]
    yield from found
    if found:
        return
    steps = total_steps(config)
    if schedule.warmup_steps >= steps:
        legal = f"fewer than the {steps} steps of the run"
        yield Problem(key="optimizer.schedule.warmup_steps", got=schedule.warmup_steps, legal=legal)
    elif schedule.name == ScheduleName.wsd and (schedule.decay_steps or 0) + schedule.warmup_steps > steps:
        legal = f"at most {steps - schedule.warmup_steps}: what the warm-up leaves of {steps} steps"
        yield Problem(key="optimizer.schedule.decay_steps", got=schedule.decay_steps, legal=legal)
    if schedule.min_learning_rate > config.optimizer.learning_rate:
        legal = f"at most optimizer.learning_rate = {config.optimizer.learning_rate}"
        yield Problem(key="optimizer.schedule.min_learning_rate", got=schedule.min_learning_rate, legal=legal)


def _tokens(key: str, tokens: str | None) -> Iterator[Problem]:
    if tokens is None:
        return
    try:
        count = parse_count(tokens)
    except ValueError:
        yield Problem(key=key, got=tokens, legal="a number such as 5000, 1.5M or 100B")
        return
    if count < 1:
        yield Problem(key=key, got=tokens, legal="at least 1 token")


def _ramp(config: RunConfig) -> Iterator[Problem]:
    """Phases with one end each, every end behind the one before."""
    step, tokens = 0, 0.0
    for number, phase in enumerate(config.train.batch_size_ramp):
        key = f"train.batch_size_ramp.{number}"
        if not phase.global_batch_size > 0:
            yield Problem(key=f"{key}.global_batch_size", got=phase.global_batch_size, legal="a number above 0")
        if (phase.until_step is None) == (phase.until_tokens is None):
            yield Problem(
                key=f"{key}.until_step", got=phase.until_step, legal="exactly one of until_step and until_tokens"
            )
        elif phase.until_step is not None:
            if phase.until_step <= step:
                yield Problem(key=f"{key}.until_step", got=phase.until_step, legal=f"a step after {step}")
            step = phase.until_step
        elif phase.until_tokens is not None:
            found = list(_tokens(f"{key}.until_tokens", phase.until_tokens))
            yield from found
            if not found and parse_count(phase.until_tokens) <= tokens:
                legal = "more tokens than the phase before ends with"
                yield Problem(key=f"{key}.until_tokens", got=phase.until_tokens, legal=legal)
            tokens = tokens if found else parse_count(phase.until_tokens)
