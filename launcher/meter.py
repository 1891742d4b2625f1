"""What a logged step reports: loss, rates, memory, and where the time went.

Reading a tensor waits for the device, so it happens here alone, at logged steps; all ranks call `summarise` together,
because memory and the hash of the samples are taken over all of them.

Model FLOPs utilisation is given in both counts that the field uses: `mfu_causal` counts the half of the attention
matrix that a causal model needs, `mfu_full` all of it, both of the peak that stands beside them. Without a known one
(a CPU) they are None. `launcher.metrics` says what each name means and in which unit.
"""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.metrics import nested
from launcher.progress import Progress
from model.config import ModelConfig
from model.size import flops_per_token
from parallel.common.files import hash_bytes
from parallel.engine import StepResult
from parallel.topology import Topology

_PHASES = ("data", "forward_backward", "communication", "optimizer", "save")
_PAUSES = ("save", "evaluate")


class Meter:
    """Collects between two logged steps, summarises at them."""

    def __init__(
        self,
        *,
        model: ModelConfig,
        vocabulary_size: int,
        sequence_length: int,
        decoder_length: int = 0,
        topology: Topology,
        peak_flops: float | None,
        pulse: Callable[[str], None],
        ledger: Callable[[], dict[str, int]],
        skipped: Callable[[], int],
    ) -> None:
        """`peak_flops` is one device's, None where nobody knows it; `ledger` gives the tokens of each source so far,
        `skipped` the steps that changed no weight."""
        flops = {
            name: flops_per_token(model, vocabulary_size, sequence_length, causal=causal, decoder_length=decoder_length)
            for name, causal in (("mfu_causal", True), ("mfu_full", False))
        }
        ranks = topology.world_size
        self._flops_share = {name: each / (peak_flops * ranks) if peak_flops else None for name, each in flops.items()}
        self._peak_flops = peak_flops
        self._topology = topology
        self._pulse = pulse
        self._ledger = ledger
        self._skipped = skipped
        self._seconds: dict[str, float] = defaultdict(float)
        self._started = time.perf_counter()
        self._tokens = 0
        self._skipped_steps = skipped()

    def begin(self, progress: Progress) -> None:
        """The clock starts; what came before (a resumed run's tokens, building) does not count."""
        self._window(progress)

    def timed[Result](self, phase: str, work: Callable[..., Result], *arguments: Any) -> Result:
        """Runs `work` as a phase of the step, which the watchdog is told, and adds its time to it."""
        self._pulse(phase)
        started = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            self._seconds[phase] += time.perf_counter() - started

    def add(self, result: StepResult) -> None:
        """Adds the phases that the engine measured in a step."""
        for phase, value in result.seconds.items():
            self._seconds[phase] += value

    def summarise(self, progress: Progress, batch: Mapping[str, Tensor], result: StepResult) -> dict[str, Any]:
        """The record of a logged step, for `metrics.jsonl`; times and skipped steps since the record before."""
        loss, grad_norm = finite(result)
        elapsed = time.perf_counter() - self._started - sum(self._seconds[phase] for phase in _PAUSES)
        rate = (progress.tokens - self._tokens) / elapsed
        record = {
            "step": progress.step,
            "loss": loss,
            "tokens": progress.tokens,
            "samples": progress.samples,
            "tokens_by_source": self._ledger(),
            "learning_rate": result.learning_rate,
            "grad_norm": grad_norm,
            "skipped_steps": self._skipped() - self._skipped_steps,
            **nested(values(result.metrics)),
            **nested(means(result.reported)),
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / self._topology.world_size,
            "peak_flops": self._peak_flops,
            **{name: None if share is None else rate * share for name, share in self._flops_share.items()},
            "memory_bytes": self._memory_bytes(),
            **{f"time_{phase}_seconds": self._seconds[phase] for phase in _PHASES},
            "batch_hash": self._batch_hash(batch["sample_ids"]),
        }
        self._window(progress)
        return record

    def _window(self, progress: Progress) -> None:
        self._seconds.clear()
        self._skipped_steps = self._skipped()
        self._started = time.perf_counter()
        self._tokens = progress.tokens

    def _memory_bytes(self) -> int:
        """Highest use so far on any rank: of the device, or of the process where the device is the CPU."""
        device = self._topology.device
        if device.type == "cuda":
            used = torch.cuda.max_memory_allocated(device)
        else:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        highest = torch.tensor(used, dtype=torch.int64, device=device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def _batch_hash(self, sample_ids: Tensor) -> str:
        """Hash of the ids of the global batch: the same for every layout."""
        group = self._topology.groups.dp
        mine = sample_ids.to(self._topology.device)
        slices = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(slices, mine, group=group)
        ids = torch.cat(slices).cpu()
        return hash_bytes(ids[ids >= 0].sort().values.numpy().tobytes())


def values(metrics: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Numbers that are on the device, fetched at once; None for one that is not finite."""
    found = torch.stack(list(metrics.values())).tolist() if metrics else []
    return {name: _number(value) for name, value in zip(metrics, found, strict=True)}


def means(reported: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Each sum over its weight, None if it is not finite; without what had no weight, as a source that was not seen."""
    pairs = torch.stack(list(reported.values())).tolist() if reported else []
    return {name: _number(total / weight) for name, (total, weight) in zip(reported, pairs, strict=True) if weight}


def finite(result: StepResult) -> tuple[float | None, float | None]:
    """Loss and gradient norm of a step, each None where it is not finite, as in a step that was skipped for it."""
    return _number(result.loss.item()), _number(result.grad_norm.item())


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
