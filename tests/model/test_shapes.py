"""The arithmetic of a rank's parameters is what the model builds, parameter by parameter and in its order."""

from dataclasses import replace
from typing import Any

import pytest

from launcher.explain.sizes import stage_sizes
from launcher.plan.stages import stage_shapes
from model.config import Activation, ClassesConfig, Classified, LoraConfig, ModelConfig, MoeConfig, Norm, Position
from parallel.config import OptimizerConfig, ParallelConfig

MODEL = ModelConfig(layers=6, hidden_size=48, heads=8, kv_heads=4, head_size=6, ffn_hidden_size=40)
GPT2 = {"norm": Norm.layer, "activation": Activation.gelu, "position": Position.learned, "positions": 32}
MOE = MoeConfig(experts=6, ffn_hidden_size=20, shared_ffn_hidden_size=12, first_layer=1)


@pytest.mark.truth
@pytest.mark.parametrize(
    ("model", "layout", "optimizer"),
    [
        ({}, {}, {}),
        ({"qk_norm": True, "attention_bias": True}, {"tensor": 2, "pipeline": 3}, {"frozen": ["qkv"]}),
        ({**GPT2, "linear_bias": True, "tie_embeddings": True}, {"tensor": 4}, {"name": "adafactor"}),
        ({**GPT2, "linear_bias": True, "tie_embeddings": True}, {"pipeline": 2}, {"name": "muon"}),
        ({"moe": MOE}, {"expert": 3, "tensor": 2, "pipeline": 2, "pipeline_split": [2, 4]}, {"name": "muon"}),
        ({"moe": MOE}, {"context": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 3}, {}),
        ({"lora": LoraConfig(rank=5)}, {"tensor": 2, "pipeline": 2}, {}),
        ({**GPT2, "linear_bias": True, "lora": LoraConfig(rank=3, targets=["v_proj", "down_proj"])}, {"tensor": 4}, {}),
        ({"moe": MOE, "lora": LoraConfig(rank=2)}, {"expert": 2}, {"name": "muon", "frozen": ["q_proj"]}),
        ({"lora": LoraConfig(rank=3), "classes": ClassesConfig(number=4, of=Classified.tokens)}, {"tensor": 2}, {}),
        ({}, {"pipeline": 2, "virtual_pipeline": 2, "pipeline_split": [1, 2, 2, 1]}, {}),
    ],
    ids=str,
)
def test_computed_is_built(model: dict[str, Any], layout: dict[str, Any], optimizer: dict[str, Any]) -> None:
    config, cut, rule = replace(MODEL, **model), ParallelConfig(**layout), OptimizerConfig(**optimizer)
    built = stage_sizes(config, cut, vocabulary_size=256, optimizer=rule)
    assert [list(stage) for stage in stage_shapes(config, cut, vocabulary_size=256, optimizer=rule)] == built
