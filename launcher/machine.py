"""The machine that a run is on, as the planner's arithmetic takes it: configured, known by its name, or measured."""

import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from launcher.config import RunConfig
from launcher.plan.facts import Facts
from launcher.plan.hardware import Efficiency, Hardware, load, of_device
from launcher.plan.seconds import NARROW
from model.size import head_size
from parallel.precision import model_dtype, on_this_machine

_TRIES = 5
_SENT_BYTES = 1 << 22
_LARGE_BYTES = 1 << 24
"""More than a cache holds."""


def known_machine(config: RunConfig, device: torch.device) -> Hardware | None:
    """`tracking.hardware`, else the file of this accelerator; None where there is none, as for a CPU.

    Raises:
        UserError: the configured one is no hardware.
    """
    if config.tracking.hardware is not None:
        return load(config.tracking.hardware)
    return of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def measured_cpu(config: RunConfig, facts: Facts) -> Hardware:
    """What this CPU reaches at the shapes that the model has, while all ranks use it; in some 0.1 s.

    All ranks call this together. The rates are not those of a data sheet: what a small product loses to its call is in
    them, so that the arithmetic of `launcher.plan.seconds` gives back what was measured.
    """
    model, dtype = config.model, model_dtype(config.precision)
    samples, length = config.train.micro_batch_size, config.train.sequence_length // config.parallel.context
    tokens, hidden, heads = samples * length, model.hidden_size, model.heads
    work = next(iter(facts.work.values()))
    width = max(1, work.narrowest // config.parallel.tensor)
    left, right = (torch.ones(shape, dtype=dtype) for shape in ((tokens, hidden), (hidden, width)))
    matrices = 2 * tokens * hidden * width / _seconds(lambda: left @ right)
    narrowest = min(tokens * work.tokens_share, hidden, width)
    peak = matrices * (narrowest + NARROW) / narrowest  # the arithmetic takes this share off again
    query = torch.ones(samples, max(1, heads // config.parallel.tensor), length, head_size(model), dtype=dtype)
    scores = 2 * tokens * length * query.shape[1] * query.shape[3]
    attention = scores / _seconds(lambda: scaled_dot_product_attention(query, query, query, is_causal=True))
    large = torch.ones(_LARGE_BYTES // 4)  # as the optimizer's, and as activations between their two uses
    moved = 3 * _LARGE_BYTES / _seconds(lambda: large * large)
    latency, rate = _links()
    return Hardware(
        name="this CPU, measured",
        peak_flops={on_this_machine(config.precision).value: peak},
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        reserved_bytes=1,
        memory_bytes_per_second=moved,
        node_bytes_per_second=rate,
        network_bytes_per_second=rate,
        host_bytes_per_second=moved,
        node_latency_seconds=latency,
        network_latency_seconds=latency,
        dollars_per_hour=1e-9,
        efficiency=Efficiency(matrices=1.0, attention=attention / peak, memory=1.0, links=1.0),
    )


def _links() -> tuple[float, float]:
    """Seconds that a collective of nothing takes, and bytes a second of one way of a ring, over all ranks."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return 1e-6, 1e12
    latency = _seconds(lambda: dist.all_reduce(torch.zeros(1)))
    sent = torch.zeros(_SENT_BYTES // 4)
    taken = max(_seconds(lambda: dist.all_reduce(sent)) - latency, 1e-9)
    return latency, 2 * _SENT_BYTES * (ranks - 1) / ranks / taken


def _seconds(work: Callable[[], object]) -> float:
    """The median of some tries."""
    taken = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return sorted(taken)[_TRIES // 2]
