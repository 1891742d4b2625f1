"""What was predicted for a run beside what it measures, said once, after its first twenty steps.

The prediction is the planner's for the run's own layout on its own machine (`launcher.machine`). Both stand in the log
and in `prediction.json` of the run, by kind where there are kinds. On a CPU, whose memory is that of the process, what
the process held before the model was made is added to what was computed.

The planner's arithmetic is of matrices, bytes and links. What Python and the libraries take for themselves in a step is
in it on a CPU alone, as so many calls of the smallest operation; an accelerator does its work meanwhile.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.config import RunConfig
from launcher.machine import known_machine, measured_cpu
from launcher.plan.estimate import Estimate, estimate
from launcher.plan.facts import Facts, unknown
from launcher.plan.hardware import Hardware
from launcher.plan.setting import ON_CPU, OURS, Setting
from launcher.plan.stages import stage_shapes
from launcher.progress import Progress
from parallel.common.files import write_json
from parallel.common.units import format_bytes, format_duration
from parallel.config import Precision
from parallel.engine import Engine
from parallel.precision import on_this_machine
from parallel.topology import Topology

STEPS = 20
"""Taken before it is said; the first of them is slow and not in the measurement."""

logger = logging.getLogger(__name__)


def predicted(config: RunConfig, engine: Engine, *, vocabulary_size: int, steps: int) -> Estimate | None:
    """The planner's, for this run; None for a run too short to say so, and for a machine or a model that it does not
    know. All ranks call this together."""
    topology, layout = engine.topology, config.parallel
    cuda = topology.device.type == "cuda"
    machine = known_machine(config, topology.device)
    if steps <= STEPS or (cuda and machine is None):
        return None
    missing = unknown(config.model, vocabulary_size)
    if missing is not None:
        logger.info("no prediction of time and memory: the planner does not know %s yet", missing)
        return None
    facts = Facts.of(
        config.model,
        vocabulary_size=vocabulary_size,
        sequence_length=config.train.sequence_length,
        optimizer=config.optimizer,
    )
    first_stage, *_ = stage_shapes(
        config.model,
        layout,
        vocabulary_size=vocabulary_size,
        optimizer=config.optimizer,
        sequence_length=config.train.sequence_length,
    )
    machine = machine or measured_cpu(config, facts, topology)
    own = sum(local.shape.numel() for local in (*engine.parameters, *engine.frozen))
    if topology.pipeline_rank == 0 and sum(size.elements for size in first_stage) != own:
        logger.info("no prediction of time and memory: the planner does not know this kind of model yet")
        return None
    return estimate(setting_of(config, facts, topology, machine))


def setting_of(config: RunConfig, facts: Facts, topology: Topology, machine: Hardware) -> Setting:
    """What a run's own estimate is of."""
    cuda = topology.device.type == "cuda"
    return Setting(
        facts=facts,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        layout=config.parallel,
        ranks=topology.world_size,
        node_ranks=min(topology.world_size, torch.cuda.device_count()) if cuda else topology.world_size,
        precision=on_this_machine(config.precision),
        matrix_precision="fp8" if cuda and config.precision is Precision.fp8 else None,
        hardware=machine,
        software=OURS if cuda else ON_CPU,
        accelerator=cuda,
        packed=config.data.mask_documents,
    )


def process_bytes(device: torch.device) -> int:
    """What this process holds now, where the device is the process's own memory; 0 on an accelerator."""
    if device.type != "cpu":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Prediction:
    """A sink that speaks once."""

    def __init__(self, estimate: Estimate, *, held_before: int, file: Path) -> None:
        self._estimate = estimate
        self._held_before = held_before
        self._file = file
        self._begun: int | None = None
        """The step of the first record, or of the first since the run went back."""
        self._tokens, self._seconds = 0, 0.0

    def log(self, progress: Progress, record: Mapping[str, Any]) -> None:
        """Adds the records up, but for the first, until there are enough steps."""
        step = int(record["step"])
        if self._begun is None or step <= self._begun:
            self._begun, self._tokens, self._seconds = step, record["tokens"], 0.0
            return
        if self._file.is_file():
            return
        self._seconds += (record["tokens"] - self._tokens) / record["tokens_per_second"]
        self._tokens = record["tokens"]
        if step >= self._begun + STEPS - 1:
            self._say(step, self._seconds / (step - self._begun), record["memory_bytes"])

    def event(self, event: Mapping[str, Any], place: int) -> None:
        """Events change nothing."""

    def close(self, exit_code: int) -> None:
        """A short run ends without a word."""

    def _say(self, step: int, step_seconds: float, memory_bytes: int) -> None:
        setting = self._estimate.setting
        computed_seconds = self._estimate.step_seconds
        computed_bytes = self._estimate.bytes_total + self._held_before
        logger.info(
            "after step %d: a step takes %s, predicted %s (%+.0f %%); "
            "the fullest rank holds %s, predicted %s (%+.0f %%); on %s",
            step,
            _duration(step_seconds),
            _duration(computed_seconds),
            100 * (computed_seconds / step_seconds - 1),
            format_bytes(memory_bytes),
            format_bytes(computed_bytes),
            100 * (computed_bytes / memory_bytes - 1),
            setting.hardware.name,
        )
        computed = {
            "step_seconds": computed_seconds,
            "memory_bytes": computed_bytes,
            "seconds": dict(self._estimate.seconds),
            "bytes": {**self._estimate.bytes, "before the model": self._held_before},
            "hardware": setting.hardware.name,
        }
        measured = {"step_seconds": step_seconds, "memory_bytes": memory_bytes}
        write_json(self._file, {"step": step, "predicted": computed, "measured": measured})


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else format_duration(seconds)
