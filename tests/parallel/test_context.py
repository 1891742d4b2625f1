"""The cut of a sequence over a context group."""

import pytest
import torch
import torch.distributed as dist

from launcher.verify.world import run_world
from parallel.config import ParallelConfig
from parallel.context import ContextParallel
from parallel.topology import Topology


def held(rank: int, size: int) -> ContextParallel:
    return ContextParallel(rank=rank, size=size, group=dist.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_token_is_on_one_rank_and_the_work_is_even(size: int) -> None:
    sequence = torch.arange(16)
    parts = [held(rank, size).part(sequence) for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == sequence.tolist()
    attended = [int((part + 1).sum()) for part in parts]  # keys that the queries of a causal sequence see
    assert len(set(attended)) == 1


def test_only_the_fields_of_tokens_are_cut() -> None:
    batch = {name: torch.arange(8).repeat(2, 1) for name in ("tokens", "labels", "positions", "document_ids")}
    cut = held(1, 2).cut({**batch, "sample_ids": torch.arange(2)})
    assert cut["tokens"].tolist() == [[2, 3, 4, 5]] * 2
    assert cut["document_ids"].shape == (2, 8)
    assert cut["sample_ids"].shape == (2,)


def gathered() -> tuple[bool, bool]:
    context = Topology.create(ParallelConfig(context=dist.get_world_size())).context
    whole = torch.arange(16.0)
    part = context.part(whole)[:, None].clone().requires_grad_()
    result = context.gather(part)
    result.backward(whole[:, None] ** 2 * (1 + context.rank))
    assert part.grad is not None
    factor = sum(range(1, context.size + 1))
    return torch.equal(result[:, 0], whole), torch.equal(part.grad[:, 0], context.part(whole) ** 2 * factor)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_gathering_restores_the_order_and_sums_the_gradients(size: int) -> None:
    assert run_world(gathered, size) == [(True, True)] * size
