"""Encoders with tiny random weights made by `transformers`: its numbers in each layout, its files bit for bit."""

import json
from collections.abc import Callable, Mapping
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
from model.config import ModelConfig
from model.hf.families import FAMILIES, config_json, model_values
from parallel.common.errors import UserError
from tests.distributed.layouts import tiny

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

SEQUENCE, ROWS, VOCABULARY = 24, 3, 250
_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6,
    "intermediate_size": 40, "max_position_embeddings": 40, "initializer_range": 0.2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 48, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3,
    "num_heads": 6, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
}  # fmt: skip
_GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(0, VOCABULARY, (ROWS, SEQUENCE), generator=_GENERATOR)
READ = torch.randint(0, VOCABULARY, (ROWS, 36), generator=_GENERATOR)
SEGMENTS = (torch.arange(SEQUENCE) > 9).long().repeat(ROWS, 1)
BATCH = {
    "tokens": TOKENS,
    "labels": TOKENS,
    "loss_weights": torch.ones(ROWS, SEQUENCE),
    "positions": torch.arange(SEQUENCE).repeat(ROWS, 1),
    "document_ids": torch.zeros(ROWS, SEQUENCE, dtype=torch.int32),
    "segment_ids": SEGMENTS,
    "encoder_tokens": READ,
    "encoder_document_ids": torch.zeros(READ.shape, dtype=torch.int32),
}


def bert(model: Any) -> list[Tensor]:
    found = model(TOKENS, token_type_ids=SEGMENTS)
    if "seq_relationship_logits" in found:
        return [found.prediction_logits, found.seq_relationship_logits.flip(-1)]
    return [found.logits]


def t5(model: Any) -> list[Tensor]:
    return [model(READ, decoder_input_ids=TOKENS).logits]


MODELS: dict[str, tuple[str, str, dict[str, Any], Callable[[Any], list[Tensor]]]] = {
    "bert": ("Bert", "BertForPreTraining", _BERT, bert),
    "bert-masked-only": ("Bert", "BertForMaskedLM", _BERT, bert),
    "t5-1.1": ("T5", "T5ForConditionalGeneration", _T5, t5),
    "t5-first": (
        "T5",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "relu", "tie_word_embeddings": True, "num_decoder_layers": 2},
        t5,
    ),
}


def theirs(name: str, directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[Tensor]]:
    """A model of `transformers`, written by itself: its config.json, its tensors, its answers to `BATCH`."""
    kind, head, values, ask = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, head)(getattr(transformers, f"{kind}Config")(**values)).eval()
    if values.get("tie_word_embeddings") is False:  # transformers 5 builds it tied all the same
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
    for parameter in model.parameters():  # what starts as ones or zeros would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    with torch.no_grad():
        answers = ask(model)
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors"), answers


def ours(found: Mapping[str, Any], names: Any) -> ModelConfig:
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), model_values(found, names)))
    assert isinstance(model, ModelConfig)
    return model


def answers_of(
    model: ModelConfig, weights: Mapping[str, Tensor], ranks: int, layout: Mapping[str, Any]
) -> list[Tensor] | None:
    """What our model gives, on the ranks of the last stage; each rank takes its shards of `weights`."""
    case = tiny(ranks, zero_stage=0, micro_batch_size=1, **layout)
    train = replace(case.config.train, sequence_length=SEQUENCE)
    engine = engine_of(replace(case, config=replace(case.config, model=model, train=train)))
    for local in engine.parameters:
        for shard in local.shards:
            value = weights[shard.description.key][shard.description.global_slice()]
            shard.of(local.parameter.data).copy_(value.view(shard.description.local_shape))
    seen: list[tuple[Tensor, ...]] = []

    def look(outputs: Any, batch: Mapping[str, Tensor], group: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        torch.distributed.all_gather(parts, logits.contiguous(), group=group)
        seen.append((torch.cat(parts, dim=-1).transpose(0, 1), *others))
        return logits.sum(), batch["loss_weights"].sum(), {}

    look.reports = ()  # type: ignore[attr-defined]
    engine._objective = look  # type: ignore[assignment]
    engine._forward_backward.keywords["seq_length"] = SEQUENCE + (READ.shape[1] if model.decoder_layers else 0)
    engine.evaluate(BATCH)
    return [torch.cat(parts) for parts in zip(*seen, strict=True)] if seen else None


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_and_round_trip(name: str, tmp_path: Path) -> None:
    found, tensors, expected = theirs(name, tmp_path)
    model = ours(found, tensors)
    family = FAMILIES[model.family]
    pairs = list(family.pairs(model))
    weights = {pair.ours: pair.join([tensors[part] for part in pair.theirs]) for pair in pairs}
    back = {
        part: tensor for pair in pairs for part, tensor in zip(pair.theirs, pair.split(weights[pair.ours]), strict=True)
    }
    again = {name: of for name, of in family.copies.items() if name in tensors and name not in back}
    assert all(torch.equal(tensors[name], tensors[of]) for name, of in again.items())
    assert back.keys() | again.keys() == tensors.keys()
    assert all(torch.equal(back[part], tensors[part]) for part in back)
    for layout, (ranks, degrees) in LAYOUTS.items():
        for answers in run_world(answers_of, ranks, model, weights, ranks, degrees):
            for answer, theirs_said in zip(answers or (), expected if answers else (), strict=True):
                answer = answer[..., : theirs_said.shape[-1]]
                difference = (answer - theirs_said).abs().max()
                assert difference < 1e-5 * max(1, float(theirs_said.abs().max())), layout
    assert all(answer.std() > 0.1 for answer in expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_comes_back(name: str, tmp_path: Path) -> None:
    found, tensors, _ = theirs(name, tmp_path)
    model = ours(found, tensors)
    written = config_json(model, sequence_length=SEQUENCE)
    again = getattr(transformers, f"{MODELS[name][0]}Config")(**written)
    for key in FAMILIES[model.family].settings.fields:
        assert getattr(again, key) == found.get(key, getattr(again, key)), key
    assert ours(written, tensors) == model
    assert written["architectures"] == [MODELS[name][1]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"type_vocab_size": 3}, "type_vocab_size = 3"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'"),
    ],
)
def test_what_is_not_understood_is_named(change: dict[str, Any], told: str) -> None:
    found = {**json.loads(transformers.BertConfig(**_BERT).to_json_string()), **change}
    with pytest.raises(UserError) as error:
        model_values(found)
    assert told in str(error.value)
