"""The Llama family against `transformers` on the same weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.verify.measure import engine_of
from launcher.verify.world import run_world
from tests.distributed.layouts import MODEL, SEQUENCE, VOCABULARY, tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

HEAD = MODEL.hidden_size // MODEL.heads


def names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names and fused matrices as those of `transformers`."""
    groups = MODEL.kv_heads or MODEL.heads
    per_group = MODEL.heads // groups
    theirs = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_norm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for number in range(MODEL.layers):
        ours, layer = f"decoder.layers.{number}.", f"model.layers.{number}."
        fused = weights[f"{ours}self_attention.linear_qkv.weight"].view(groups, per_group + 2, HEAD, -1)
        query, key, value = fused.split((per_group, 1, 1), dim=1)
        gate, up = weights[f"{ours}mlp.linear_fc1.weight"].chunk(2)
        theirs |= {
            f"{layer}self_attn.q_proj.weight": query.reshape(-1, MODEL.hidden_size),
            f"{layer}self_attn.k_proj.weight": key.reshape(-1, MODEL.hidden_size),
            f"{layer}self_attn.v_proj.weight": value.reshape(-1, MODEL.hidden_size),
            f"{layer}self_attn.o_proj.weight": weights[f"{ours}self_attention.linear_proj.weight"],
            f"{layer}mlp.gate_proj.weight": gate,
            f"{layer}mlp.up_proj.weight": up,
            f"{layer}mlp.down_proj.weight": weights[f"{ours}mlp.linear_fc2.weight"],
            f"{layer}input_layernorm.weight": weights[f"{ours}input_layernorm.weight"],
            f"{layer}post_attention_layernorm.weight": weights[f"{ours}pre_mlp_layernorm.weight"],
        }
    return theirs


def logits_of_both() -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and theirs, [batch, sequence, vocabulary]."""
    model = engine_of(tiny(zero_stage=0)).updater.module.chunks[0]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.ffn_hidden_size,
        num_hidden_layers=MODEL.layers,
        num_attention_heads=MODEL.heads,
        num_key_value_heads=MODEL.kv_heads,
        rms_norm_eps=MODEL.norm_eps,
        rope_theta=MODEL.rope_base,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
    )
    reference = LlamaForCausalLM(config)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    reference.load_state_dict(names(weights))
    tokens = torch.randint(0, VOCABULARY, (3, SEQUENCE), generator=torch.Generator().manual_seed(0))
    batch = {
        "tokens": tokens,
        "positions": torch.arange(SEQUENCE).expand(3, -1),
        "document_ids": torch.zeros(3, SEQUENCE, dtype=torch.int32),
    }
    with torch.no_grad():
        return model(batch).transpose(0, 1), reference(tokens).logits


def test_the_logits_are_those_of_transformers() -> None:
    ((ours, theirs),) = run_world(logits_of_both, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert theirs.std() > 0.1
