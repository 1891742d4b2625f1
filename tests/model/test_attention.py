"""Attention inside documents against a dense mask, and the leak that must not be."""

import math
from itertools import pairwise

import pytest
import torch

from model.attention import RotaryTable, document_lengths, rotate
from parallel.config import ParallelConfig
from tests.distributed.layouts import Row, batch, make_engine
from tests.distributed.world import run_world

pytestmark = pytest.mark.truth


def test_document_lengths() -> None:
    assert document_lengths(torch.zeros(3, 5, dtype=torch.int32)) is None
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 2]], dtype=torch.int32)
    assert document_lengths(ids) == [2, 3, 5, 1, 3, 1]


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
    engine = make_engine(Row(name="", ranks=1, layout=ParallelConfig(zero_stage=0), dtype=torch.float64))
    model = engine.updater.module.chunks[0]
    attention = model.decoder.layers[0].self_attention.core_attention
    inputs = batch(1)
    seen = {}

    def look(_module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        seen.update(q=args[0], k=args[1], v=args[2], context=kwargs["packed_seq_params"], output=output)

    attention.register_forward_hook(look, with_kwargs=True)
    logits = model(inputs)
    query, key = (rotate(seen[name], seen["context"].cosine, seen["context"].sine) for name in "qk")
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
