"""A ramp moves the borders of steps and never the order of samples."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch_sizes import BatchSizes
from data_pipeline.config import PhaseConfig
from data_pipeline.loader import Loader
from data_pipeline.plan import Plan
from data_pipeline.store import Store
from launcher.config import RunConfig, load
from launcher.length import batch_sizes, total_steps
from launcher.progress import Progress
from tests.data_pipeline.stores import distinct_documents, make_store

TRAINING = {"web": distinct_documents([11, 3, 40, 0, 17, 55], 100), "code": distinct_documents([25, 80], 1000)}
RAMPS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), max_size=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("ramp") / "store", TRAINING, shard_tokens=60)


@given(st.integers(1, 9), RAMPS)
@settings(max_examples=200, deadline=None)
def test_steps_and_positions_are_two_names_of_one_place(size: int, ramp: list[tuple[int, int]]) -> None:
    sizes = BatchSizes(size, ramp)
    expected = [each for each, steps in ramp for _ in range(steps)] + [size] * 5
    position = 0
    for step, each in enumerate(expected):
        assert sizes.position(step) == position
        assert sizes.at(position) == each
        assert sizes.steps(position) == step
        assert sizes.steps(position + 1) == step + 1
        alike = sizes.alike(position)
        following = [*expected[step:], None]
        assert alike is None or following[:alike] == [each] * alike
        position += each


def config(*overrides: str) -> RunConfig:
    return load([], ["train.global_batch_size=16", "train.sequence_length=10", *overrides])


def test_a_ramp_by_steps_and_by_tokens() -> None:
    ramp = "train.batch_size_ramp=[{global_batch_size: 4, until_step: 3}, {global_batch_size: 8, until_tokens: 300}]"
    sizes = batch_sizes(config(ramp))
    assert [(phase.step, phase.position, phase.size) for phase in sizes.phases] == [(0, 0, 4), (3, 12, 8), (6, 36, 16)]
    assert total_steps(config(ramp, "train.tokens=120")) == 3
    assert total_steps(config(ramp, "train.tokens=121")) == 4
    assert total_steps(config(ramp, "train.tokens=360")) == 6
    assert total_steps(config(ramp, "train.tokens=361")) == 7


def test_progress_counts_what_each_step_takes() -> None:
    progress = Progress(total_steps=4, batch_sizes=BatchSizes(4, [(1, 2), (2, 1)]), sequence_length=10)
    seen = []
    for _ in progress.remaining():
        progress.advance()
        seen.append((progress.samples, progress.tokens, progress.remaining_tokens))
    assert seen == [(1, 10, 70), (2, 20, 60), (4, 40, 40), (8, 80, 0)]


def loader(store: Store, ramp: list[tuple[int, int]], *, rank: int = 0, ranks: int = 1, **options: Any) -> Loader:
    return Loader(
        store, mixture={}, sequence_length=16, global_batch_size=8, micro_batch_size=1, dp_rank=rank, dp_size=ranks,
        seed=3, plan=Plan(ramp=ramp, **options),
    )  # fmt: skip


def rows(loaders: list[Loader], steps: int) -> list[dict[str, torch.Tensor]]:
    """The global batch of each step, fillers left out, in the order of samples."""
    found = []
    for _ in range(steps):
        parts = [each.next_batch() for each in loaders]
        together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        real = together["sample_ids"] >= 0
        found.append({name: tensor[real] for name, tensor in together.items()})
    return found


RAMP = [(2, 3), (5, 2)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_samples_are_those_of_a_run_without_a_ramp(store: Store, ranks: int) -> None:
    ramped = rows([loader(store, RAMP, rank=rank, ranks=ranks) for rank in range(ranks)], 8)
    assert [len(batch["tokens"]) for batch in ramped] == [2, 2, 2, 5, 5, 8, 8, 8]
    plain = rows([loader(store, [])], 5)
    for name in ("sample_ids", "tokens", "labels", "document_ids"):
        together = torch.cat([batch[name] for batch in ramped])
        assert torch.equal(together, torch.cat([batch[name] for batch in plain]))


@pytest.mark.parametrize("step", range(7))
def test_a_run_resumed_inside_a_ramp_goes_on_with_the_same_batches(store: Store, step: int) -> None:
    whole = loader(store, RAMP)
    expected = rows([whole], 8)[step:]
    stopped = loader(store, RAMP)
    rows([stopped], step)
    resumed = [loader(store, RAMP, rank=rank, ranks=2) for rank in range(2)]
    for each in resumed:
        each.load_state_dict(stopped.state_dict())
    for found, wanted in zip(rows(resumed, 8 - step), expected, strict=True):
        assert torch.equal(found["tokens"], wanted["tokens"])


def test_a_curriculum_of_lengths_follows_the_steps_of_the_ramp(store: Store) -> None:
    """Short contexts until step 4, whichever sample that is; the tokens are the same ones."""
    phases = (PhaseConfig(from_step=0, sequence_length=4), PhaseConfig(from_step=4, sequence_length=16))
    short = rows([loader(store, RAMP, schedule=phases)], 6)
    plain = rows([loader(store, RAMP)], 6)
    for step, (batch, same) in enumerate(zip(short, plain, strict=True)):
        assert torch.equal(batch["tokens"], same["tokens"])
        if step < 4:
            assert batch["positions"].max() == 3
            assert batch["document_ids"].max() >= 3
        else:
            assert torch.equal(batch["positions"], same["positions"])
            assert torch.equal(batch["document_ids"], same["document_ids"])
