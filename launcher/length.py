"""How long a run is, in steps and in samples: what `train.steps`, `train.tokens` and the ramp of batch sizes come to.

Contract: everything is a function of the configuration alone. Imports without torch.
"""

import math

from data_pipeline.batch_sizes import BatchSizes
from launcher.config import RunConfig
from parallel.common.units import parse_count


def ramp(config: RunConfig) -> list[tuple[int, int]]:
    """Pairs of a size and how many steps have it, before all others have `train.global_batch_size`.

    A phase that begins where it should have ended has no step.
    """
    found: list[tuple[int, int]] = []
    step = samples = 0
    for phase in config.train.batch_size_ramp:
        size = phase.global_batch_size
        if phase.until_step is not None:
            steps = phase.until_step - step
        else:
            assert phase.until_tokens is not None
            wanted = parse_count(phase.until_tokens) / config.train.sequence_length - samples
            steps = math.ceil(wanted / size)
        steps = max(0, steps)
        found.append((size, steps))
        step, samples = step + steps, samples + steps * size
    return found


def batch_sizes(config: RunConfig) -> BatchSizes:
    """Samples of each step."""
    return BatchSizes(config.train.global_batch_size, ramp(config))


def total_steps(config: RunConfig) -> int:
    """Optimizer steps of the whole run: `train.steps`, or `train.tokens` rounded up to whole steps."""
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.tokens is not None
    samples = math.ceil(parse_count(config.train.tokens) / config.train.sequence_length)
    return batch_sizes(config).steps(samples)
