"""What the ranks of a tiny copy of a layout really hold, beside what the arithmetic says."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

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


def bytes_held(case: Case, *dtypes: torch.dtype) -> list[list[Bytes]]:
    """For each rank and dtype: the arithmetic of `parallel.memory` beside what live tensors hold."""
    steady = _steady(case)
    return run_world(lambda: [_bytes(replace(steady, dtype=dtype)) for dtype in dtypes], case.ranks)


def before_last_micro_batch[Seen](engine: Engine, case: Case, look: Callable[[], Seen]) -> Seen:
    """What `look` sees in the middle of a step, when only one forward pass is left; the step stays without update."""
    seen: list[Seen] = []
    at_last_forward_pass(engine, case, lambda: seen.append(look()))
    engine.accumulate(batch_of(case, 0, engine.topology))
    return seen[-1]


def at_last_forward_pass(engine: Engine, case: Case, call: Callable[[], None]) -> None:
    """Calls once before the last forward pass of the engine's next step on a batch of the case."""
    samples = len(batch_of(case, 0, engine.topology)["tokens"])
    last = samples // case.config.train.micro_batch_size * case.config.parallel.virtual_pipeline
    passes = itertools.count(1)
    engine.updater.module.register_forward_pre_hook(lambda *_: call() if next(passes) == last else None)


def _steady(case: Case) -> Case:
    """The case with so many micro-batches that each chunk has had a backward pass before the last forward pass."""
    train, layout = case.config.train, case.config.parallel
    data = case.ranks // (layout.tensor * layout.pipeline * layout.context)
    enough = 4 * layout.pipeline * layout.virtual_pipeline * train.micro_batch_size * data
    return replace(case, config=replace(case.config, train=replace(train, global_batch_size=enough)))


def _bytes(case: Case) -> Bytes:
    engine = engine_of(case)
    topology, layout = engine.topology, case.config.parallel
    computed = predicted(
        sizes([*engine.parameters, *engine.frozen], case.config.optimizer),
        mechanism=mechanism(
            layout,
            tied=case.config.model.trains_tied_embeddings,
            sharers=topology.data_parallel_group.size(),
            optimizer=case.config.optimizer.name,
        ),
        width=engine.parameters[0].parameter.dtype.itemsize,
        sharing=Sharing(
            ranks=topology.data_parallel_group.size(),
            rank=topology.data_parallel_group.rank(),
            expert_ranks=topology.expert_data_parallel_group.size(),
            expert_rank=topology.expert_data_parallel_group.rank(),
            tensor_ranks=layout.tensor,
            tensor_rank=topology.tensor_rank,
        ),
        offload=layout.offload,
        averaged=case.config.optimizer.average_decay is not None,
    )
    if topology.device.type == "cpu":  # the host is the device
        computed = {
            kind: count + computed.get(f"{HOST}{kind}", 0)
            for kind, count in computed.items()
            if not kind.startswith(HOST)
        }
    return Bytes(computed=computed, measured=dict(before_last_micro_batch(engine, case, engine.held)))
