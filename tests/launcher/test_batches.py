"""Every slice reads its own rows, all ranks of a slice the same; a rank that does not is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.loader import Loader
from data_pipeline.store import Store
from launcher.batches import Batches, compare
from launcher.verify.world import run_world
from parallel.common.errors import UserError
from parallel.config import ParallelConfig
from parallel.topology import Topology

pytestmark = pytest.mark.distributed


def loader(store: Path, topology: Topology, *, seed: int = 1, dp_rank: int | None = None) -> Loader:
    return Loader(
        Store.open(store),
        mixture={},
        sequence_length=32,
        global_batch_size=8,
        micro_batch_size=1,
        dp_rank=topology.data_parallel_rank if dp_rank is None else dp_rank,
        dp_size=topology.data_parallel_size,
        seed=seed,
    )


def read(store: Path, layout: ParallelConfig) -> tuple[int, list[int]]:
    topology = Topology.create(layout)
    batches = Batches(loader(store, topology), topology)
    return topology.data_parallel_rank, [int(sample) for _ in range(3) for sample in batches.next()["sample_ids"]]


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor": 2}, {"pipeline": 2}, {"context": 2}, {"expert": 2}, {"tensor": 2, "context": 2}],
    ids=lambda layout: "-".join(layout) or "data",
)
def test_slices_have_rows_of_their_own_and_their_ranks_agree(store: Path, layout: dict[str, Any]) -> None:
    found = run_world(read, 4, store, ParallelConfig(**layout))
    by_slice = dict(found)
    assert all(by_slice[place] == ids for place, ids in found)
    assert sorted(sample for ids in by_slice.values() for sample in ids) == list(range(24))


def wrong(store: Path, layout: ParallelConfig, seeds: list[int], places: list[int | None]) -> str:
    topology = Topology.create(layout)
    made = loader(store, topology, seed=seeds[topology.rank], dp_rank=places[topology.rank])
    with pytest.raises(UserError) as error:
        Batches(made, topology).next()
    return str(error.value)


def test_a_rank_with_another_order_is_named_on_all_ranks(store: Path) -> None:
    (told,) = set(run_world(wrong, 4, store, ParallelConfig(tensor=2), [1, 1, 1, 2], [None] * 4))
    assert told.startswith("ranks 2 and 3 belong to data-parallel slice 1 but read different rows")


def test_slices_that_read_the_same_samples_are_named(store: Path) -> None:
    (told,) = set(run_world(wrong, 2, store, ParallelConfig(), [1, 1], [0, 0]))
    assert told.startswith("ranks 0 and 1 belong to different data-parallel slices but read the same samples")


def fillers() -> None:
    topology = Topology.create(ParallelConfig())
    ids = torch.arange(2) if topology.rank == 0 else torch.full((2,), -1)
    compare({"sample_ids": ids, "tokens": torch.zeros(2, 4)}, topology)


def test_slices_of_fillers_alone_are_nobodys_samples() -> None:
    run_world(fillers, 3)
