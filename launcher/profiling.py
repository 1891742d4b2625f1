"""A profile of some steps: PyTorch's trace, a table of the dearest operations, a snapshot of the memory.

    bloomery train my-run.yaml train.profile_start_step=20 train.profile_stop_step=22

They lie in `profile/` of the run, for each of `train.profile_ranks`: `rank-00000.json.gz` opens in Perfetto or
chrome://tracing, `rank-00000.txt` is to read, and on an accelerator `rank-00000.memory.pickle` opens in
pytorch.org/memory_viz (we write it and never read it). The first profiled step comes after those before it have been
taken without being watched, so that it shows nothing that only a first step does.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_ROWS = 40
_EVENTS = 1_000_000
"""Allocations that a memory snapshot remembers."""

logger = logging.getLogger(__name__)


class Profile:
    """Watches no step."""

    def watched(self, steps: Iterable[int]) -> Iterator[int]:
        """The same steps; what is done with each lies between two of them."""
        yield from steps


class StepProfile(Profile):
    """Watches the steps from `start` to `stop`, both included, of those that are left."""

    def __init__(self, directory: Path, *, start: int, stop: int, rank: int, device: torch.device) -> None:
        self._directory = directory
        self._start, self._stop, self._rank, self._device = start, stop, rank, device

    def watched(self, steps: Iterable[int]) -> Iterator[int]:
        running: profile | None = None
        taken: list[int] = []
        try:
            for step in steps:
                if running is None and not taken and self._start <= step <= self._stop:
                    running = self._begun()
                yield step
                if running is not None:
                    taken.append(step)
                    if step >= self._stop:
                        self._ended(running, taken)
                        running = None
        finally:
            if running is not None:  # the run stops earlier
                self._ended(running, taken)

    def _begun(self) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        running = profile(activities=activities, record_shapes=True, profile_memory=True, acc_events=True)
        running.start()
        return running

    def _ended(self, running: profile, taken: list[int]) -> None:
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self._device)
        running.stop()
        self._directory.mkdir(exist_ok=True)
        base = self._directory / f"rank-{self._rank:05d}"
        running.export_chrome_trace(f"{base}.json.gz")
        by_time = "self_device_time_total" if cuda else "self_cpu_time_total"
        by_memory = "self_device_memory_usage" if cuda else "self_cpu_memory_usage"
        operations = running.key_averages()
        steps = f"steps {taken[0]} to {taken[-1]}" if taken else "a step that was not finished"
        tables = [
            f"{title}, {steps}\n{operations.table(sort_by=order, row_limit=_ROWS, max_name_column_width=60)}"
            for title, order in (("dearest operations by time", by_time), ("by memory that they take", by_memory))
        ]
        Path(f"{base}.txt").write_text("\n\n".join(tables) + "\n")
        if cuda:
            torch.cuda.memory._dump_snapshot(f"{base}.memory.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profiled %s: %s.txt and beside it", steps, base)
