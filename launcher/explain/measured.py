"""What a tiny copy of a layout really does, looked at in forked ranks: bytes held, and collectives as they happen."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from launcher.explain.sizes import sizes
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from parallel.engine import Engine
from parallel.mechanism import mechanism
from parallel.memory import HOST, Sharing, predicted


@dataclass(frozen=True, kw_only=True, slots=True)
class Bytes:
    """What one rank of a tiny copy holds between two micro-batches, by kind."""

    computed: dict[str, int]
    measured: dict[str, int]


def bytes_held(case: Case) -> list[Bytes]:
    """For each rank: the arithmetic of `parallel.memory` beside what live tensors hold."""
    return run_world(lambda: _bytes(case), case.ranks)


def before_last_micro_batch[Seen](engine: Engine, case: Case, look: Callable[[], Seen]) -> Seen:
    """What `look` sees in the middle of a step, when only one forward pass is left; the step stays without update."""
    batch = batch_of(case, 0, engine.topology)
    passes = itertools.count(1)
    last = len(batch["tokens"]) // case.config.train.micro_batch_size * case.config.parallel.virtual_pipeline
    seen: list[Seen] = []
    engine.updater.module.register_forward_pre_hook(lambda *_: seen.append(look()) if next(passes) == last else None)
    engine.accumulate(batch)
    return seen[-1]


def _bytes(case: Case) -> Bytes:
    engine = engine_of(case)
    topology, layout = engine.topology, case.config.parallel
    computed = predicted(
        sizes(engine.parameters),
        mechanism=mechanism(layout, tied=case.config.model.tie_embeddings),
        width=engine.parameters[0].parameter.dtype.itemsize,
        sharing=Sharing(
            ranks=topology.data_parallel_group.size(),
            rank=topology.data_parallel_group.rank(),
            expert_ranks=topology.expert_data_parallel_group.size(),
            expert_rank=topology.expert_data_parallel_group.rank(),
        ),
        offload=layout.offload,
    )
    if topology.device.type == "cpu":  # the host is the device
        computed = {
            kind: count + computed.get(f"{HOST}{kind}", 0)
            for kind, count in computed.items()
            if not kind.startswith(HOST)
        }
    return Bytes(computed=computed, measured=dict(before_last_micro_batch(engine, case, engine.updater.held)))
