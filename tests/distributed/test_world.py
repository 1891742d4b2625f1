"""The helper that every distributed test stands on: results, failures, deaths and hangs of forked worlds."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from launcher.verify.world import RankDied, WorldTimeout, run_world


def _sum_of_ranks(offset: int) -> float:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return value.item()


def test_results_come_in_the_order_of_the_ranks() -> None:
    assert run_world(_sum_of_ranks, 2, 10) == [21.0, 21.0]
    assert run_world(dist.get_rank, 3) == [0, 1, 2]


def test_a_world_costs_under_a_second() -> None:
    """Of the processor, which does not depend on what else this machine does; a rank that imports takes five."""
    before = os.times()
    run_world(_sum_of_ranks, 2, 0)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_the_first_exception_is_raised_with_its_rank() -> None:
    def fail_on_one() -> None:
        if dist.get_rank() == 1:
            raise KeyError("layer.weight")
        dist.barrier()

    with pytest.raises(KeyError, match=r"layer\.weight") as caught:
        run_world(fail_on_one, 2)
    assert "on rank 1 of 2" in caught.value.__notes__[0]
    assert "fail_on_one" in caught.value.__notes__[0]


def test_a_killed_rank_is_named() -> None:
    def die_on_one() -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()

    with pytest.raises(RankDied) as caught:
        run_world(die_on_one, 2)
    assert caught.value.ranks == {1: -signal.SIGKILL}


def test_a_stuck_rank_is_named_with_its_stack() -> None:
    def hang_on_one() -> None:
        if dist.get_rank() == 1:
            time.sleep(60)

    with pytest.raises(WorldTimeout, match=r"(?s)ranks 1 of 2 .*hang_on_one"):
        run_world(hang_on_one, 2, seconds=4)
