"""Attention inside documents against a dense mask, and the leak that must not be."""

import math
from itertools import pairwise

import pytest
import torch

from launcher.verify.measure import batch_of, engine_of
from launcher.verify.world import run_world
from model.attention import RotaryTable, find_pieces, rotate
from model.layer_context import Pieces
from tests.distributed.layouts import tiny

pytestmark = pytest.mark.truth


def test_the_pieces_are_the_documents() -> None:
    assert find_pieces(torch.zeros(3, 5, dtype=torch.int32), [(0, 5)]) is None
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 2]], dtype=torch.int32)
    found = find_pieces(ids, [(0, 5)])
    assert found is not None
    assert found.documents == [2, 3, 5, 1, 3, 1]
    assert found.queries == [(length, index, length) for index, length in enumerate(found.documents)]


def seen_by_each_query(pieces: Pieces) -> list[list[int]]:
    """Which tokens of the flattened batch each query may attend to, by brute force."""
    starts = [sum(pieces.documents[:index]) for index in range(len(pieces.documents))]
    return [
        list(range(starts[document], starts[document] + keys - length + number + 1))
        for length, document, keys in pieces.queries
        for number in range(length)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_pieces_of_two_chunks_see_their_documents_up_to_themselves(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(3, 16, generator=generator) < 0.2).cumsum(dim=1).int()
    for chunks in ([(0, 4), (12, 16)], [(4, 8), (8, 12)]):
        pieces = find_pieces(ids, chunks)
        assert pieces is not None
        expected = [
            [row * 16 + other for other in range(place + 1) if ids[row, other] == ids[row, place]]
            for row in range(3)
            for first, last in chunks
            for place in range(first, last)
        ]
        assert seen_by_each_query(pieces) == expected


def test_rotation_turns_each_pair_by_its_angle() -> None:
    table = RotaryTable(head_size=8, base=100.0, sequence_length=16, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 11]])
    heads = torch.randn(3, 1, 2, 8, dtype=torch.float64)
    turned = rotate(heads, *table(positions))
    as_complex = torch.complex(heads[..., :4], heads[..., 4:])
    angles = torch.tensor([[p * 100.0 ** (-i / 4) for i in range(4)] for p in (0, 5, 11)], dtype=torch.float64)
    expected = as_complex * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1))


def attention_of_a_model() -> tuple[float, bool]:
    """The largest difference to a dense mask, and whether another document's text left the logits alone."""
    case = tiny(zero_stage=0, dtype=torch.float64)
    engine = engine_of(case)
    model = engine.updater.module.chunks[0]
    attention = model.decoder.layers[0].self_attention.core_attention
    inputs = batch_of(case, 1, engine.topology)
    seen = {}

    def look(_module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        seen.update(q=args[0], k=args[1], v=args[2], context=kwargs["packed_seq_params"], output=output)

    attention.register_forward_hook(look, with_kwargs=True)
    logits = model(inputs)
    query, key = (rotate(seen[name], *seen["context"].rotation) for name in "qk")
    key, value = (tensor.repeat_interleave(2, dim=2) for tensor in (key, seen["v"]))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) / math.sqrt(query.shape[-1])
    ids = inputs["document_ids"]
    length = ids.shape[1]
    allowed = (ids[:, :, None] == ids[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)
    expected = torch.einsum("bhij,jbhd->ibhd", weights, value).flatten(2)
    difference = (expected - seen["output"]).abs().max().item()

    changed = dict(inputs, tokens=inputs["tokens"].clone())
    first = ids == 0
    changed["tokens"][first] = (changed["tokens"][first] + 1) % 256
    others = (ids != 0).T
    untouched = torch.equal(model(changed)[others], logits[others]) and any(a != b for a, b in pairwise(ids[1]))
    return difference, untouched


@pytest.mark.distributed
def test_documents_attend_within_themselves_and_leak_nothing() -> None:
    ((difference, untouched),) = run_world(attention_of_a_model, 1)
    assert difference < 1e-14
    assert untouched
