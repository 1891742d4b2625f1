"""Torch's flight recorder: which collective operations this rank has entered, and when.

It is on in every run (a ring of some thousand records, a microsecond each), under gloo and NCCL alike. It answers two
questions. Who is slow: of one operation, the rank that enters last is the one that the others wait for. Who hangs,
where work is asynchronous and all stacks look alike: the rank that has entered fewer operations of a group.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._C import _distributed_c10d

RECORDS = 2000
Operation = tuple[str, int]
"""Name of the process group, number of the operation in it; the same on all of its ranks."""


def record() -> None:
    """Turns the recorder on; call it before the first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDS))


def arrivals(since_ns: int = 0) -> dict[Operation, int]:
    """{operation: when this rank entered it}, nanoseconds of the wall clock; messages between two ranks left out."""
    return {
        (entry["process_group"][0], entry["collective_seq_id"]): entry["time_created_ns"]
        for entry in _entries()
        if not entry["is_p2p"] and entry["time_created_ns"] >= since_ns
    }


def newest(entered: Mapping[Operation, int]) -> dict[str, int]:
    """{process group: number of the last operation entered}."""
    return {group: max(number for name, number in entered if name == group) for group in {name for name, _ in entered}}


def waited_for(entered: Sequence[Mapping[Operation, int]]) -> list[float]:
    """For each rank the seconds that all others of a group spent waiting for it alone: for the last to enter, how much
    later than the last but one it came, added up over the operations.

    Clocks of hosts differ. Where operations follow each other closely nobody is late, so the least that a rank was ever
    late by is its clock, and is taken off.
    """
    late: list[dict[Operation, int]] = [{} for _ in entered]
    for operation in {operation for mine in entered for operation in mine}:
        times = [mine[operation] for mine in entered if operation in mine]
        if len(times) > 1:
            for mine, found in zip(entered, late, strict=True):
                if operation in mine:
                    found[operation] = mine[operation] - min(times)
    late = [{operation: value - min(mine.values()) for operation, value in mine.items()} for mine in late]
    waited = [0] * len(entered)
    for operation in {operation for mine in late for operation in mine}:
        ranked = sorted((mine[operation], rank) for rank, mine in enumerate(late) if operation in mine)
        waited[ranked[-1][1]] += ranked[-1][0] - ranked[-2][0]
    return [nanoseconds / 1e9 for nanoseconds in waited]


def _entries() -> list[dict[str, Any]]:
    recorder: Any = _distributed_c10d
    dumps = [recorder._dump_fr_trace_json]
    if torch.cuda.is_available():
        dumps.append(recorder._dump_nccl_trace_json)
    return [entry for dump in dumps for entry in json.loads(dump()).get("entries", [])]
