"""The arithmetic of activations beside what autograd's saved-tensor hooks see: 5 %, in every kind of layout.

A block that computes itself again keeps more than its input, and hooks do not see it: the function that autograd calls
holds what was handed to the block, cosines and sines among it. So what outlives the forward pass is added.
"""

import weakref
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from launcher.plan.stages import chunk_layers
from launcher.verify.batches import Traits
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from model.activations import MicroBatch, chunk_bytes, embedding_bytes, logits_bytes, output_bytes
from model.config import Activation, ClassesConfig, Dispatcher, LoraConfig, MoeConfig, Norm, Position
from model.layer_context import LayerContext
from model.specs import Block
from parallel.config import Logits, Recompute, RecomputeConfig
from tests.distributed.layouts import tiny

SELECTIVE = RecomputeConfig(mode=Recompute.selective)
FULL = RecomputeConfig(mode=Recompute.full)
GPT2 = {
    "norm": Norm.layer,
    "activation": Activation.gelu,
    "position": Position.learned,
    "linear_bias": True,
    "kv_heads": 4,
}
MOE = MoeConfig(experts=4, ffn_hidden_size=32, shared_ffn_hidden_size=16)
SAMPLES = 2


def kept(case: Case) -> int:
    """Bytes that the forward pass of one micro-batch keeps on this rank: each storage once, parameters left out."""
    engine = engine_of(case)
    batch = engine.topology.context.cut(batch_of(case, 0, engine.topology))
    micro_batch = {name: tensor[:SAMPLES] for name, tensor in batch.items()}
    micro_batch["loss_factor"] = torch.ones((), dtype=torch.float64)
    held = (*engine.parameters, *engine.frozen)
    parameters = {local.parameter.untyped_storage().data_ptr() for local in held}
    if not engine.topology.is_first_pipeline_stage:
        config = case.config
        shape = (config.train.sequence_length, SAMPLES, config.model.hidden_size)
        engine._stages[0].set_input_tensor([torch.randn(shape, dtype=case.dtype, requires_grad=True)])
    saved: dict[int, Tensor] = {}
    handed = _handed(engine.updater.module)

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = engine._stages[0](micro_batch)
        if engine.topology.is_last_pipeline_stage:
            engine._loss(micro_batch, outputs)
        for part in engine.updater.module.modules():
            if isinstance(getattr(part, "tokens", None), LayerContext):
                del part.tokens  # kept until the next forward pass, whoever comes: of one micro-batch, not of each
        for tensor in (reference() for reference in handed):
            if tensor is not None:
                pack(tensor)
        return sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in parameters)


def _handed(model: torch.nn.Module) -> list[weakref.ref[Tensor]]:
    """What blocks will be handed about the tokens of the next forward pass."""
    found: list[weakref.ref[Tensor]] = []

    def look(_block: torch.nn.Module, _arguments: Any, options: dict[str, Any]) -> None:
        context = options["packed_seq_params"]
        values = [getattr(context, field.name) for field in fields(context)]
        for value in [*values, *(context.rotation or ())]:
            if isinstance(value, Tensor):
                found.append(weakref.ref(value))

    for block in (module for module in model.modules() if isinstance(module, Block)):
        block.register_forward_pre_hook(look, with_kwargs=True)
    return found


def computed(case: Case, stage: int) -> int:
    model, layout = case.config.model, case.config.parallel
    batch = MicroBatch(
        samples=SAMPLES,
        sequence=case.config.train.sequence_length // layout.context,
        tensor=layout.tensor,
        context=layout.context,
        sequence_parallel=layout.tensor > 1 and layout.sequence_parallel is not False,
        width=case.dtype.itemsize,
        packed=case.traits.packed,
        logit_rows=None if layout.logits is Logits.whole or model.classes.number else 64,
    )
    first, last = stage == 0, stage == layout.pipeline - 1
    found = chunk_bytes(model, chunk_layers(model.layers, layout)[stage], batch, layout.recompute)
    if first:
        found += embedding_bytes(model, batch)
    if last:
        assert model.vocabulary_size is not None
        found += output_bytes(model, batch) + logits_bytes(model, model.vocabulary_size, batch)[0]
    return found


@pytest.mark.distributed
@pytest.mark.truth
@pytest.mark.parametrize(
    ("model", "layout", "dtype", "packed"),
    [
        ({}, {}, torch.float32, False),
        ({}, {"logits": Logits.whole}, torch.float32, False),
        ({"classes": ClassesConfig(number=4)}, {"tensor": 2}, torch.float32, True),
        ({}, {}, torch.bfloat16, False),
        ({}, {}, torch.bfloat16, True),
        (GPT2, {}, torch.bfloat16, False),
        ({"dropout": 0.1, "qk_norm": True, "attention_bias": True}, {"tensor": 2}, torch.bfloat16, False),
        ({"qk_norm": True}, {}, torch.float32, False),
        ({"qk_norm": True}, {}, torch.bfloat16, True),
        ({"qk_norm": True}, {"context": 2}, torch.float32, True),
        ({"activation": Activation.geglu}, {"tensor": 2, "sequence_parallel": False}, torch.float32, True),
        ({}, {"context": 2}, torch.bfloat16, False),
        ({}, {"context": 2, "tensor": 2}, torch.float32, True),
        ({"moe": MOE}, {}, torch.float32, False),
        ({"moe": MOE}, {"tensor": 2}, torch.bfloat16, False),
        ({"moe": replace(MOE, dispatcher=Dispatcher.allgather)}, {}, torch.bfloat16, False),
        ({**GPT2, "kv_heads": 2}, {}, torch.float32, False),
        ({"qk_norm": True}, {"recompute": SELECTIVE, "tensor": 2}, torch.bfloat16, True),
        ({}, {"recompute": replace(FULL, blocks=1), "pipeline": 2}, torch.float32, False),
    ],
    ids=str,
)
def test_computed_is_kept(model: dict[str, Any], layout: dict[str, Any], dtype: torch.dtype, packed: bool) -> None:
    # Narrow heads in two bytes are attended to in fp32 on a CPU alone, and what is kept of that is not at issue.
    head_size = 16 if dtype is torch.float32 else 40
    shape = {"hidden_size": 64, "head_size": head_size, "ffn_hidden_size": 96}
    check(case_of({**shape, **model}, layout, dtype, packed))


@pytest.mark.distributed
@pytest.mark.truth
@pytest.mark.parametrize("recompute", [SELECTIVE, FULL], ids=["selective", "full"])
@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"tensor": 2, "sequence_parallel": False}], ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ({"hidden_size": 40, "head_size": 56, "ffn_hidden_size": 72}, torch.bfloat16),
        ({"hidden_size": 72, "head_size": 24, "ffn_hidden_size": 104}, torch.float32),
    ],
    ids=str,
)
def test_computed_is_kept_where_blocks_compute_again(
    recompute: RecomputeConfig, layout: dict[str, Any], shape: dict[str, Any], dtype: torch.dtype
) -> None:
    """Heads together are wider than the hidden states, or no multiple of a power of two."""
    check(case_of(shape, {**layout, "recompute": recompute}, dtype, dtype is torch.bfloat16))


@pytest.mark.distributed
@pytest.mark.truth
@pytest.mark.parametrize(
    ("model", "lora", "layout", "dtype", "packed"),
    [
        ({}, {}, {}, torch.float32, False),
        ({}, {"dropout": 0.1}, {"tensor": 2}, torch.bfloat16, True),
        ({}, {"targets": ["q_proj", "v_proj"]}, {"tensor": 2, "sequence_parallel": False}, torch.bfloat16, True),
        ({}, {"targets": ["o_proj", "down_proj"]}, {"recompute": SELECTIVE}, torch.float32, True),
        ({"qk_norm": True, "dropout": 0.1}, {"targets": ["up_proj"]}, {}, torch.float32, True),
        ({}, {}, {"recompute": replace(FULL, blocks=1), "pipeline": 2}, torch.bfloat16, False),
        ({}, {}, {"recompute": FULL, "tensor": 2}, torch.bfloat16, True),
        (GPT2, {}, {"context": 2}, torch.float32, False),
        ({"moe": MOE}, {}, {"tensor": 2}, torch.bfloat16, False),
    ],
    ids=str,
)
def test_computed_is_kept_of_adapters_and_frozen_matrices(
    model: dict[str, Any], lora: dict[str, Any], layout: dict[str, Any], dtype: torch.dtype, packed: bool
) -> None:
    head_size = 24 if dtype is torch.float32 else 40
    shape = {"hidden_size": 72, "head_size": head_size, "ffn_hidden_size": 104, "lora": LoraConfig(rank=5, **lora)}
    check(case_of({**shape, **model}, layout, dtype, packed))


def case_of(model: dict[str, Any], layout: dict[str, Any], dtype: torch.dtype, packed: bool) -> Case:
    """The tiny model changed, in a layout with one data-parallel rank."""
    ranks = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    case = tiny(ranks, zero_stage=0, micro_batch_size=SAMPLES, **layout)
    train = replace(case.config.train, sequence_length=32)
    config = replace(case.config, model=replace(case.config.model, **model), train=train)
    return replace(case, config=config, dtype=dtype, traits=Traits(packed=packed))


def check(case: Case) -> None:
    """Of every rank."""
    measured = run_world(lambda: kept(case), case.ranks)
    stages = case.config.parallel.pipeline
    for rank, found in enumerate(measured):
        assert computed(case, rank * stages // case.ranks) == pytest.approx(found, rel=0.05)


@pytest.mark.distributed
@pytest.mark.truth
def test_experts_on_several_ranks_keep_their_share_on_the_average() -> None:
    """Which rank's experts get more tokens is the router's doing; together they get all."""
    case = tiny(2, zero_stage=0, micro_batch_size=SAMPLES, expert=2)
    case = replace(
        case, config=replace(case.config, model=replace(case.config.model, moe=MOE)), traits=Traits(packed=False)
    )
    measured = run_world(lambda: kept(case), 2)
    assert computed(case, 0) == pytest.approx(sum(measured) / 2, rel=0.05)
