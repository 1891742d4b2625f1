"""Runs of a flattened array as rectangles, and what ranks hold of a model as a whole one."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.verify.compare import whole
from launcher.verify.measure import batch_of, engine_of
from launcher.verify.world import run_world
from parallel.fragments import rectangles, whole_value
from parallel.updater import Kind
from tests.distributed.layouts import tiny


def _run(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[tuple[int, ...], int, int]]:
    elements = math.prod(shape)
    return st.tuples(st.just(shape), st.integers(0, elements), st.integers(0, elements))


@given(st.lists(st.integers(1, 5), max_size=4).map(tuple).flatmap(_run))
@settings(max_examples=300, deadline=None)
def test_rectangles_cover_a_run_in_the_order_of_memory(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = np.arange(math.prod(shape)).reshape(shape)
    found = list(rectangles(shape, start, stop))
    covered = [
        numbers[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))].ravel() for offset, extent in found
    ]
    assert np.concatenate([[], *covered]).tolist() == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert all(math.prod(extent) for _, extent in found), "none is empty"


def test_a_matrix_needs_three_rectangles_and_often_fewer() -> None:
    assert list(rectangles((4, 3), 2, 10)) == [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    assert list(rectangles((4, 3), 3, 9)) == [((1, 0), (2, 3))]
    assert list(rectangles((4, 3), 4, 5)) == [((1, 1), (1, 1))]
    assert list(rectangles((), 0, 1)) == [((), ())]
    assert list(rectangles((4, 3), 5, 5)) == []


def _seen(ranks: int, layout: dict[str, Any]) -> list[Any]:
    """From each rank: its rectangles after a step, what `whole_value` says, and its share of the elements."""

    def work() -> Any:
        case = tiny(ranks, **layout)
        config = replace(case.config, train=replace(case.config.train, global_batch_size=3 * ranks))
        case = replace(case, config=config)
        engine = engine_of(case)
        engine.step(batch_of(case, 0, engine.topology))
        participants = engine.participants()
        state = [*participants["model"].state_dict().values(), *participants["optimizer"].state_dict().values()]
        live = [tensor.data for tensor in engine.updater.live()["masters"] if tensor is not None]
        places = [(memory.data_ptr(), memory.data_ptr() + memory.nbytes) for memory in live]
        for piece in participants["model"].state_dict().values():
            assert any(first <= piece.data.data_ptr() < last for first, last in places), "a view, not a copy"
        values = {
            kind: [
                (shard.description, shard.of(whole_value(engine.updater, local, kind)).double().numpy().copy())
                for local in engine.parameters
                for shard in local.shards
            ]
            for kind in Kind
        }
        pieces = [(piece, piece.data.double().numpy().copy()) for piece in state]
        return pieces, values, sum(piece.data.numel() for piece in state)

    return run_world(work, ranks)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(3, {"zero_stage": 1}), (3, {"zero_stage": 3}), (2, {"zero_stage": 0}), (2, {"tensor": 2})],
    ids=["dp3-zero1", "dp3-zero3", "dp2-zero0", "tp2"],
)
def test_the_ranks_pieces_are_the_whole_values(ranks: int, layout: dict[str, Any]) -> None:
    """Three ranks divide no dimension of this model: fragments begin and end inside rows, and stage 3 pads."""
    answers = _seen(ranks, layout)
    pieces = whole([answer[0] for answer in answers])
    assert not pieces.copies
    for kind in Kind:
        values = whole([answer[1][kind] for answer in answers])
        assert not values.copies
        for name, value in values.tensors.items():
            assert np.array_equal(pieces.tensors[f"{kind.value}.{name}"], value), name
    elements = sum(tensor.size for tensor in pieces.tensors.values())
    if ranks == 3:
        assert sum(answer[2] for answer in answers) == elements, "each element is held once"
        assert max(answer[2] for answer in answers) < elements / 2


@pytest.mark.distributed
def test_a_negative_zero_survives_being_put_together() -> None:
    def work() -> bool:
        engine = engine_of(tiny(2, zero_stage=1))
        local = engine.parameters[0]
        for fragment in engine.updater.fragments(local, Kind.first_moment):
            fragment.value.fill_(-0.0)
        return bool(torch.signbit(whole_value(engine.updater, local, Kind.first_moment)).all())

    assert run_world(work, 2) == [True, True]
