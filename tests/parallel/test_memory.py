"""The arithmetic of memory is what live tensors hold, to the byte: every kind, on every rank, padding included."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from launcher.explain.measured import bytes_held
from model.config import LatentConfig, LoraConfig, MoeConfig
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth, pytest.mark.slow]

ODD = {"hidden_size": 24, "ffn_hidden_size": 36, "head_size": 6, "qk_norm": True, "attention_bias": True}
"""Sizes that no number of ranks divides well."""
MOE = MoeConfig(experts=6, ffn_hidden_size=20, shared_ffn_hidden_size=12, first_layer=1)

LATENT = {
    "kv_heads": None, "head_size": 10, "latent": LatentConfig(kv_rank=7, q_rank=9, rope_head_size=4, value_head_size=6),
    "moe": replace(MOE, expert_bias=True), "post_norms": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "dtype", "model", "layout"),
    [
        (2, torch.float32, {}, {"zero_stage": 0}),
        (2, torch.float16, {}, {"zero_stage": 0, "pipeline": 2}),
        (3, torch.float32, ODD, {"zero_stage": 1}),
        (3, torch.float32, ODD, {"zero_stage": 2}),
        (3, torch.bfloat16, ODD, {"zero_stage": 2}),
        (3, torch.bfloat16, ODD, {"zero_stage": 3}),
        (3, torch.bfloat16, ODD, {"zero_stage": 1, "offload": True}),
        (3, torch.float32, ODD, {"zero_stage": 2, "offload": True}),
        (3, torch.bfloat16, ODD, {"zero_stage": 2, "offload": True}),
        (3, torch.float32, ODD, {"zero_stage": 3, "offload": True}),
        (2, torch.bfloat16, {"tie_embeddings": True}, {"zero_stage": 1, "pipeline": 2, "offload": True}),
        (4, torch.float32, ODD, {"zero_stage": 2, "pipeline": 2, "pipeline_split": [3, 1]}),
        (4, torch.bfloat16, {}, {"zero_stage": 1, "pipeline": 2, "virtual_pipeline": 2}),
        (4, torch.float32, {"moe": MOE}, {"zero_stage": 2, "expert": 2}),
        (4, torch.bfloat16, {"moe": MOE}, {"zero_stage": 1, "expert": 2, "tensor": 2}),
        (4, torch.bfloat16, {"tie_embeddings": True, "lora": LoraConfig(rank=3)}, {"zero_stage": 2, "pipeline": 2}),
        (4, torch.bfloat16, {"lora": LoraConfig(rank=3)}, {"zero_stage": 1, "tensor": 2}),
        (3, torch.float32, {**ODD, "lora": LoraConfig(rank=5, targets=["v_proj", "o_proj"])}, {"zero_stage": 3}),
        (4, torch.bfloat16, LATENT, {"zero_stage": 1, "expert": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_computed_is_measured(ranks: int, dtype: torch.dtype, model: dict[str, Any], layout: dict[str, Any]) -> None:
    case = tiny(ranks, **layout)
    train = replace(case.config.train, global_batch_size=12)
    case = replace(case, config=replace(case.config, model=replace(case.config.model, **model), train=train))
    for (rank,) in bytes_held(case, dtype):
        assert rank.computed == rank.measured
