"""Prefix LM samples: how much of each document is given, which labels count, the same on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.config import Packing
from data_pipeline.loader import Loader
from data_pipeline.plan import Plan
from data_pipeline.store import Store
from tests.data_pipeline.stores import distinct_documents, make_store

SEQUENCE = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path: Path = tmp_path_factory.mktemp("prefix") / "store"
    return make_store(path, {"web": distinct_documents([3, 11, 0, 60, 7, 1, 25, 140] * 8)}, shard_tokens=10_000)


def rows(
    store: Store, form: str, *, batches: int = 20, ranks: int = 1, rank: int = 0, **options: Any
) -> dict[str, Tensor]:
    loader = Loader(
        store, mixture={}, sequence_length=SEQUENCE, global_batch_size=4, micro_batch_size=1, dp_rank=rank,
        dp_size=ranks, seed=11, plan=Plan(form=form, **options),
    )  # fmt: skip
    made = [loader.next_batch() for _ in range(batches)]
    return {name: torch.cat([batch[name] for batch in made]) for name in made[0]}


@pytest.mark.parametrize("packing", Packing)
def test_the_beginning_of_each_document_is_given_and_what_is_unseen_counts(store: Store, packing: Packing) -> None:
    found, plain = rows(store, "prefix", packing=packing), rows(store, "causal", packing=packing)
    for name in ("tokens", "labels", "positions", "document_ids", "sample_ids"):
        assert torch.equal(found[name], plain[name]), name
    shares = []
    for row in range(len(found["tokens"])):
        ids, prefix, weights = (found[name][row] for name in ("document_ids", "prefix", "loss_weights"))
        for number in ids.unique().tolist():
            mine = ids == number
            real = int(plain["loss_weights"][row][mine].sum())
            known = int(prefix[mine].sum())
            assert prefix[mine].tolist() == [place < known for place in range(int(mine.sum()))]
            assert (1 <= known <= real) if real else known == 0
            unseen = [1.0 if known - 1 <= place < real else 0.0 for place in range(int(mine.sum()))]
            assert weights[mine].tolist() == unseen
            if real >= 20:
                shares.append(known / real)
    assert 0.35 < sum(shares) / len(shares) < 0.65
    assert min(shares) < 0.15
    assert max(shares) > 0.85


def test_ranks_change_nothing_and_another_pass_gives_another_part(store: Store) -> None:
    whole = rows(store, "prefix", batches=6)
    parts = [rows(store, "prefix", batches=6, ranks=2, rank=rank) for rank in (0, 1)]
    for name, tensor in whole.items():
        halves = [part[name].unflatten(0, (6, 2)) for part in parts]
        assert torch.equal(torch.cat(halves, dim=1).flatten(0, 1), tensor), name
    again = rows(store, "prefix", batches=400)
    by_text: dict[bytes, set[int]] = {}
    for tokens, prefix in zip(again["tokens"], again["prefix"], strict=True):
        by_text.setdefault(tokens.numpy().tobytes(), set()).add(int(prefix.sum()))
    assert max(len(given) for given in by_text.values()) > 1
