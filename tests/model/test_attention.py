"""Attention inside documents against a dense mask, and the leak that must not be."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from launcher.verify.measure import batch_of, engine_of
from launcher.verify.world import run_world
from model.attention import find_pieces, in_fp32
from model.config import ModelConfig
from model.layer_context import Pieces
from model.rope import rotate
from tests.distributed.layouts import tiny

pytestmark = pytest.mark.truth


def test_the_pieces_are_the_documents() -> None:
    assert find_pieces(torch.zeros(3, 5, dtype=torch.int32), [(0, 5)]) is None
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 2]], dtype=torch.int32)
    found = find_pieces(ids, [(0, 5)])
    assert found is not None
    assert found.documents == [2, 3, 5, 1, 3, 1]
    assert found.queries == [(length, index, 0, length, True) for index, length in enumerate(found.documents)]


def seen_by_each_query(pieces: Pieces) -> list[list[int]]:
    """Which tokens of the flattened batch each query may attend to, by brute force."""
    starts = [sum(pieces.documents[:index]) for index in range(len(pieces.documents))]
    return [
        list(range(starts[document], starts[document] + (keys - length + number + 1 if causal else keys)))
        for length, document, _, keys, causal in pieces.queries
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


@pytest.mark.parametrize("seed", range(5))
def test_the_tokens_of_a_prefix_see_each_other_and_the_rest_what_is_before_it(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(3, 16, generator=generator) < 0.2).cumsum(dim=1).int()
    prefix = torch.zeros_like(ids, dtype=torch.bool)
    for row, own in enumerate(ids):
        for number in own.unique().tolist():
            places = (own == number).nonzero().flatten()
            known = int(torch.randint(0, len(places) + 1, (1,), generator=generator))
            prefix[row, places[:known]] = True
    for chunks in ([(0, 16)], [(0, 4), (12, 16)], [(4, 8), (8, 12)]):
        pieces = find_pieces(ids, chunks, prefix=prefix)
        assert pieces is not None
        expected = [
            [
                row * 16 + other
                for other in range(16)
                if ids[row, other] == ids[row, place] and (other <= place or prefix[row, [other, place]].all())
            ]
            for row in range(3)
            for first, last in chunks
            for place in range(first, last)
        ]
        assert seen_by_each_query(pieces) == expected


def attention_of_a_model(values: dict[str, Any], objective: str) -> tuple[list[float], bool]:
    """Of each layer the largest difference to a dense mask; whether another document's text left the logits alone."""
    case = tiny(zero_stage=0, dtype=torch.float64)
    train = replace(case.config.train, objective=objective)
    case = replace(case, config=replace(case.config, model=replace(case.config.model, **values), train=train))
    config = case.config.model
    engine = engine_of(case)
    model = engine.updater.module.chunks[0]
    inputs = batch_of(case, 1, engine.topology)
    seen: list[dict[str, Any]] = []

    def look(_module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        seen.append({"q": args[0], "k": args[1], "v": args[2], "context": kwargs["packed_seq_params"], "out": output})

    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_hook(look, with_kwargs=True)
    logits = model(inputs)
    ids = inputs["document_ids"]
    prefix = inputs.get("prefix", torch.zeros_like(ids, dtype=torch.bool))
    differences = [
        (_dense(config, layer, one, ids, prefix) - one["out"]).abs().max().item() for layer, one in enumerate(seen)
    ]
    changed = dict(inputs, tokens=inputs["tokens"].clone())
    first = ids == 0
    changed["tokens"][first] = (changed["tokens"][first] + 1) % 256
    others = (ids != 0).T
    untouched = torch.equal(model(changed)[others], logits[others]) and any(a != b for a, b in pairwise(ids[1]))
    return differences, untouched


def _dense(
    config: ModelConfig, layer: int, seen: dict[str, Any], ids: torch.Tensor, prefix: torch.Tensor
) -> torch.Tensor:
    """What the layer's attention has to give, by a mask over whole rows."""
    window = config.window(layer)
    context = seen["context"]
    rotation = context.local_rotation if window is not None and config.rope_local_base else context.rotation
    query, key = (rotate(seen[name], *rotation) for name in "qk")
    key, value = (tensor.repeat_interleave(2, dim=2) for tensor in (key, seen["v"]))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key)
    scores = scores / math.sqrt(config.query_pre_attention_scalar or query.shape[-1])
    if config.attention_softcap is not None:
        scores = config.attention_softcap * (scores / config.attention_softcap).tanh()
    length = ids.shape[1]
    back = torch.arange(length)[:, None] - torch.arange(length)
    both = prefix[:, :, None] & prefix[:, None, :]
    allowed = (ids[:, :, None] == ids[:, None, :]) & ((back >= 0) | both) & (back.abs() < (window or length))
    weights = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, value).flatten(2)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"sliding_window": 3},
        {"sliding_window": 4, "full_attention_every": 2, "rope_local_base": 20.0},
        {"sliding_window": 4, "full_attention_every": 3, "attention_softcap": 0.5, "query_pre_attention_scalar": 3},
        {"sliding_window": 4, "pattern": "FWW", "rope_local_base": 20.0},
        {"rope_share": 0.5, "query_pre_attention_scalar": 24},
    ],
    ids=["plain", "window", "alternating", "capped", "pattern", "partly-turned"],
)
@pytest.mark.parametrize("objective", ["causal_lm", "prefix_lm"])
@pytest.mark.distributed
def test_documents_attend_within_themselves_and_leak_nothing(values: dict[str, Any], objective: str) -> None:
    ((differences, untouched),) = run_world(attention_of_a_model, 1, values, objective)
    assert len(differences) == 4
    assert max(differences) < 1e-14
    assert untouched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_narrow_heads_are_nearer_to_float64_than_by_the_kernel_of_two_bytes(dtype: torch.dtype, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, heads, 48, 16, generator=generator).to(dtype) for heads in (4, 2, 2)]
    mask = torch.randn(1, 4, 48, 48, generator=generator).to(dtype) if masked else None
    options: dict[str, Any] = {"enable_gqa": True, "is_causal": not masked}

    def found(attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        own = [tensor.to(dtype).requires_grad_() for tensor in tensors]
        result = attend(*own, attn_mask=None if mask is None else mask.to(dtype), **options)
        return [result, *torch.autograd.grad(result.square().sum(), own)]

    truth = found(scaled_dot_product_attention, torch.float64)
    ours, kernel = (found(attend, dtype) for attend in (in_fp32, scaled_dot_product_attention))
    for mine, its, true in zip(ours, kernel, truth, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - true).norm() <= 1.001 * (its.double() - true).norm()
