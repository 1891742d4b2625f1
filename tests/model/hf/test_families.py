"""Every family with tiny random weights made by `transformers` itself: its logits, and its files back bit for bit."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from launcher.verify.measure import engine_of
from launcher.verify.world import run_world
from model.config import FamilyName, ModelConfig
from model.hf.families import FAMILIES, config_json, model_values
from model.hf.pairs import filled_up, vocabulary
from parallel.common.errors import UserError
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

SEQUENCE = 24
_SIZES: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0}
_GEMMA = {**_SIZES, "num_hidden_layers": 4, "head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 20}
_NEOX = {
    **{key: value for key, value in _SIZES.items() if key != "num_key_value_heads"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
}
_DEEPSEEK = {
    **_SIZES, "num_key_value_heads": 6,
    "num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 2, "moe_intermediate_size": 12, "routed_scaling_factor": 1.7, "q_lora_rank": 20,
    "kv_lora_rank": 14, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8,
}  # fmt: skip
_DEEP_YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.8, "mscale_all_dim": 1.1, "truncate": True,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 250, "n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 40, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SIZES),
    "llama-3.1-tied": ("Llama", {**_SIZES, "tie_word_embeddings": True, "rope_parameters": _LLAMA_3_1}),
    "llama-1": ("Llama", {**_SIZES, "num_key_value_heads": 6}),
    "mistral": ("Mistral", {**_SIZES, "sliding_window": 7, "head_dim": 12}),
    "qwen2-tied": ("Qwen2", {**_SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {**_SIZES, "head_dim": 16}),
    "mixtral": ("Mixtral", {**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "Qwen3Moe",
        {
            **_SIZES,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-not-normalised": (
        "Qwen3Moe",
        {
            **_SIZES,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "tie_word_embeddings": True,
        },
    ),
    "llama-yarn": ("Llama", {**_SIZES, "rope_parameters": _YARN}),
    "gpt-neox": ("GPTNeoX", _NEOX),
    "gpt-neox-in-turn-tied": ("GPTNeoX", {**_NEOX, "use_parallel_residual": False, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3Text",
        {
            **_GEMMA,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": _LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gemma3-untied": ("Gemma3Text", {**_GEMMA, "num_hidden_layers": 2, "tie_word_embeddings": False}),
    "deepseek-v3": ("DeepseekV3", {**_DEEPSEEK, "n_group": 4, "topk_group": 2, "rope_parameters": _DEEP_YARN}),
    "deepseek-v3-plain-queries": ("DeepseekV3", {**_DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek-v2": ("DeepseekV2", {**_DEEPSEEK, "rope_parameters": _DEEP_YARN, "topk_method": "greedy"}),
    "deepseek-v2-in-groups": (
        "DeepseekV2",
        {**_DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "gpt2": ("GPT2", _GPT2),
}
TOKENS = torch.randint(0, 250, (3, SEQUENCE), generator=torch.Generator().manual_seed(0))


def theirs(name: str, directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """A model of `transformers`, written by itself: its config.json, its tensors, its logits on `TOKENS`."""
    kind, values = MODELS[name]
    torch.manual_seed(1)
    head = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind.removesuffix('Text')}ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, head)._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # what starts as ones or zeros would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    with torch.no_grad():
        logits = model(TOKENS).logits
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors"), logits


def ours(found: Mapping[str, Any]) -> ModelConfig:
    typed = OmegaConf.merge(OmegaConf.structured(ModelConfig), model_values(found))
    model = OmegaConf.to_object(typed)
    assert isinstance(model, ModelConfig)
    return model


def logits(model: ModelConfig, weights: Mapping[str, Tensor], ranks: int, layout: Mapping[str, Any]) -> Tensor | None:
    """[batch, sequence, vocabulary] on the ranks of the last stage; each rank takes its shards of `weights`."""
    case = tiny(ranks, zero_stage=0, micro_batch_size=1, **layout)
    train = replace(case.config.train, sequence_length=SEQUENCE)
    engine = engine_of(replace(case, config=replace(case.config, model=model, train=train)))
    for local in engine.parameters:
        for shard in local.shards:
            described = shard.description
            value = weights[described.key][described.global_slice()]
            shard.of(local.parameter.data).copy_(value.view(described.local_shape))
    seen: list[Tensor] = []

    def look(outputs: Tensor, batch: Mapping[str, Tensor], group: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        parts = [torch.empty_like(outputs) for _ in range(group.size())]
        torch.distributed.all_gather(parts, outputs.contiguous(), group=group)
        seen.append(torch.cat(parts, dim=-1).transpose(0, 1))
        return outputs.sum(), batch["loss_weights"].sum(), {}

    look.reports = ()  # type: ignore[attr-defined]
    engine._objective = look  # type: ignore[assignment]
    share = 3 if engine.topology.data_parallel_size == 1 else None  # data-parallel ranks all read the whole batch here
    rows = TOKENS[:share]
    engine.evaluate(
        {
            "tokens": rows,
            "labels": rows,
            "loss_weights": torch.ones(rows.shape),
            "positions": torch.arange(SEQUENCE).repeat(len(rows), 1),
            "document_ids": torch.zeros(rows.shape, dtype=torch.int32),
        }
    )
    return torch.cat(seen) if seen else None


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "ep2": (2, {"expert": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_round_trip(name: str, tmp_path: Path) -> None:
    found, tensors, expected = theirs(name, tmp_path)
    model = ours(found)
    pairs = list(FAMILIES[model.family].pairs(model))
    weights = {pair.ours: pair.join([tensors[part] for part in pair.theirs]) for pair in pairs}
    back = {
        part: tensor for pair in pairs for part, tensor in zip(pair.theirs, pair.split(weights[pair.ours]), strict=True)
    }
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[part], tensors[part]) for part in tensors)
    for layout, (ranks, degrees) in LAYOUTS.items():
        if layout == "ep2" and not model.moe.experts:
            continue
        answers = [answer for answer in run_world(logits, ranks, model, weights, ranks, degrees) if answer is not None]
        assert answers
        for answer in answers:
            difference = (answer[..., :250] - expected).abs().max()
            assert difference < 1e-5 * max(1, float(expected.abs().max())), layout
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_comes_back(name: str) -> None:
    kind, values = MODELS[name]
    found = json.loads(getattr(transformers, f"{kind}Config")(**values).to_json_string())
    written = config_json(ours(found), sequence_length=SEQUENCE)
    again = getattr(transformers, f"{kind}Config")(**written)
    said = set(FAMILIES[FamilyName(found["model_type"])].settings.fields) | {"rope_parameters"}
    for key in said & found.keys():
        if key == "n_inner":
            assert written[key] == 4 * written["n_embd"]
        elif found[key] is not None:
            assert getattr(again, key) == found[key], key
    first, second = ours(found), ours(written)
    head_size = first.head_size or first.hidden_size // first.heads
    assert second == replace(first, head_size=second.head_size)
    assert second.head_size in (None, head_size)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("llama", {"model_type": "rwkv"}, "model_type 'rwkv'"),
        ("llama", {"model_type": "nemotron_h"}, "partly Mamba: they need Transformer Engine and CUDA kernels"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("llama", {"residual_multiplier": 2.0}, "residual_multiplier = 2.0"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}, "'yarn'"),
        ("qwen2-tied", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_what_is_not_understood_is_named(name: str, change: dict[str, Any], told: str) -> None:
    kind, values = MODELS[name]
    found = {**json.loads(getattr(transformers, f"{kind}Config")(**values).to_json_string()), **change}
    with pytest.raises(UserError) as error:
        model_values(found)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"qk_norm": True}, "a llama has no model.qk_norm = True"),
        ({"family": FamilyName.qwen3}, "a qwen3 has model.qk_norm = True"),
        ({"linear_bias": True}, "a llama has no model.linear_bias = True"),
        ({"sliding_window": 8}, "a llama has no model.sliding_window = 8"),
    ],
)
def test_what_a_family_cannot_say_is_not_exported(change: dict[str, Any], told: str) -> None:
    model = replace(ModelConfig(layers=2, hidden_size=32, heads=4, ffn_hidden_size=48, vocabulary_size=256), **change)
    with pytest.raises(UserError) as error:
        config_json(model, sequence_length=SEQUENCE)
    assert told in str(error.value)


@pytest.mark.parametrize("lift", [0.0, -40.0, 40.0])
def test_rows_that_only_fill_up_take_no_more_than_their_share(lift: float) -> None:
    """Of a model whose logits are far below 0, as GPT-2's are, or far above."""
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = torch.randn(20, 48, generator=generator), torch.randn(250, 48, generator=generator)
    biases = torch.randn(250, generator=generator) + lift
    config = ModelConfig(vocabulary_size=384, unpadded_vocabulary_size=250)
    pair = vocabulary("a", "b", config)
    ours, bias = (filled_up(pair.join([tensor]), pair.filling) for tensor in (theirs, biases))
    assert torch.equal(ours[:250], theirs)
    before = (hidden @ theirs.T + biases).logsumexp(dim=-1)
    after = (hidden @ ours.T + bias).logsumexp(dim=-1)
    assert float((after - before).max()) < math.log(384 / 250)
    assert (ours.shape, bias.shape) == ((384, 48), (384,))


def test_older_files_say_rotary_positions_elsewhere() -> None:
    found = {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "hidden_act": "silu", "rope_theta": 5e5,
        "rope_scaling": {**{key: value for key, value in _LLAMA_3_1.items() if key != "rope_theta"}},
    }  # fmt: skip
    assert ours(found).rope_base == 5e5
    assert ours(found).rope_scaling.factor == 8.0
    assert ours({**found, "rope_scaling": None}).rope_scaling.factor == 1.0
