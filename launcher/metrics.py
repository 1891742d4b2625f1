"""Every number that a run reports, with its unit: the one table.

`launcher.meter` and `launcher.evaluation.looks` fill a record and `metrics.jsonl` keeps it; a test holds the table
and what runs write together. A name that ends in `.*` stands for one name a source or layer. Imports without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """What a number is."""

    unit: str
    meaning: str


_SECONDS = "seconds since the record before"

METRICS: Mapping[str, Metric] = {
    "step": Metric(unit="steps", meaning="optimizer steps done"),
    "loss": Metric(unit="nats a token", meaning="training loss of the step's global batch, weighted"),
    "loss_by_source.*": Metric(unit="nats a token", meaning="of the tokens of a source, without z-loss"),
    "validation_loss": Metric(unit="nats a token", meaning="on a fixed sample of the validation documents"),
    "z_loss": Metric(unit="squared nats a token", meaning="squared log-normaliser of predictions, without coefficient"),
    "validation_loss_by_source.*": Metric(unit="nats a token", meaning="the same on the validation documents"),
    "validation_z_loss": Metric(unit="squared nats a token", meaning="the same on the validation documents"),
    "tasks.*": Metric(unit="its own", meaning="a figure of a task of evaluate.tasks: tasks.NAME.FIGURE"),
    "load_balance_loss": Metric(unit="1", meaning="1: experts are used evenly; mean over layers, without coefficient"),
    "router_z_loss": Metric(unit="squared nats a token", meaning="of the routers' scores, without coefficient"),
    "busiest_expert": Metric(unit="1", meaning="the largest router_load of all layers"),
    "router_load.*": Metric(unit="1", meaning="of a layer: largest share of its tokens of one expert, times experts"),
    "learning_rate": Metric(unit="1", meaning="of the step"),
    "grad_norm": Metric(unit="1", meaning="global gradient norm before clipping; none for a skipped step"),
    "skipped_steps": Metric(unit="steps", meaning="without an update since the record before: overflowed or refused"),
    "tokens": Metric(unit="tokens", meaning="seen so far"),
    "samples": Metric(unit="samples", meaning="seen so far"),
    "tokens_by_source.*": Metric(unit="tokens", meaning="seen so far of a source"),
    "tokens_per_second": Metric(unit="tokens a second", meaning="since the record before, pauses left out"),
    "tokens_per_second_per_rank": Metric(unit="tokens a second", meaning="of one rank"),
    "mfu_causal": Metric(unit="share of peak_flops", meaning="model FLOPs, the masked half of attention left out"),
    "mfu_full": Metric(unit="share of peak_flops", meaning="model FLOPs, attention counted whole"),
    "peak_flops": Metric(unit="operations a second", meaning="of one rank's device, by which MFU is measured"),
    "memory_bytes": Metric(unit="bytes", meaning="highest use so far on any rank: of the device, else of the process"),
    "time_data_seconds": Metric(unit=_SECONDS, meaning="waiting for the next batch"),
    "time_forward_backward_seconds": Metric(unit=_SECONDS, meaning="all micro-batches, their communication included"),
    "time_communication_seconds": Metric(unit=_SECONDS, meaning="reducing gradients after the last backward pass"),
    "time_optimizer_seconds": Metric(unit=_SECONDS, meaning="clipping and updating"),
    "time_save_seconds": Metric(unit=_SECONDS, meaning="writing checkpoints, as far as training waited"),
    "batch_hash": Metric(unit="xxh3-128", meaning="of the ids of the global batch's samples"),
}


def metric(name: str) -> Metric | None:
    """The row of a flat name; None where the table has none."""
    return METRICS.get(name) or METRICS.get(f"{name.partition('.')[0]}.*")


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with `tokens_by_source: {code: 3}` as `tokens_by_source.code: 3`."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            found[name] = value
    return found


def nested(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `flat` undoes; a source's name may have dots of its own."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        group, dot, key = name.partition(".")
        if dot:
            found.setdefault(group, {})[key] = value
        else:
            found[name] = value
    return found
