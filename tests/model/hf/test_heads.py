"""Heads for classes of every family, made by `transformers` with random weights: its logits, its files bit for bit."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from launcher.conversion.check import our_outputs
from launcher.verify.world import run_world
from model.config import ClassesConfig, Classified, FamilyName, ModelConfig
from model.hf.families import FAMILIES, config_json, pairs_of
from parallel.common.errors import UserError
from tests.model.hf import test_encoders, test_families

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

SEQUENCE, PADDING = 20, 7
LABELS = ("iron", "ore", "slag")
ENDS = torch.tensor([20, 13, 17])
"""Tokens of each row; the rest is padding."""
PLACES = torch.arange(SEQUENCE).expand(3, -1)
TOKENS = torch.randint(8, 250, (3, SEQUENCE), generator=torch.Generator().manual_seed(0)).where(
    ENDS[:, None] > PLACES, PADDING
)
KINDS: dict[str, dict[str, Any]] = {**dict(test_families.MODELS.values()), "Bert": test_encoders._BERT}
"""A model of each family."""
HEADS = [(kind, of) for kind in KINDS for of in Classified]


def theirs(kind: str, of: Classified, directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor] | None:
    """A model of `transformers`, written by itself; None where it has no such class."""
    head = "SequenceClassification" if of is Classified.texts else "TokenClassification"
    if not hasattr(transformers, f"{kind}For{head}"):
        return None
    torch.manual_seed(1)
    named = dict(enumerate(LABELS))
    config = getattr(transformers, f"{kind}Config")(**KINDS[kind], pad_token_id=PADDING, id2label=named)
    model = getattr(transformers, f"{kind}For{head}")._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # what starts as ones or zeros would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    with torch.no_grad():
        logits = model(TOKENS, attention_mask=(TOKENS != PADDING).long()).logits
    return json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors"), logits


def ours(found: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[ModelConfig, dict[str, Tensor], Tensor]:
    model = test_encoders.ours(found, tensors)
    weights = {pair.ours: pair.join([tensors[part] for part in pair.theirs]) for pair in pairs_of(model)}
    inside = ENDS[:, None] > PLACES
    batch = {
        "tokens": TOKENS,
        "positions": torch.where(inside, PLACES, PLACES - ENDS[:, None]),
        "document_ids": (~inside).int(),
    }
    outputs = our_outputs(model, weights, batch, sequence_length=SEQUENCE)
    assert isinstance(outputs, Tensor)
    return model, weights, outputs.transpose(0, 1)


def test_every_family_tells_classes_as_transformers_does(tmp_path: Path) -> None:
    made = {(kind, of): theirs(kind, of, tmp_path / f"{kind}-{of}") for kind, of in HEADS}
    there = {key: value for key, value in made.items() if value is not None}
    assert {found["model_type"] for found, *_ in there.values()} == {*FAMILIES} - {FamilyName.t5}

    def compute() -> dict[Any, Any]:
        return {key: ours(found, tensors) for key, (found, tensors, _) in there.items()}

    (computed,) = run_world(compute, 1)
    for (kind, of), (found, tensors, expected) in there.items():
        model, weights, logits = computed[kind, of]
        assert (model.classes.number, model.classes.of) == (3, of)
        if of is Classified.texts:
            logits = logits[torch.arange(3), torch.zeros(3, dtype=torch.long) if kind == "Bert" else ENDS - 1]
            counted = torch.ones(3, dtype=torch.bool)
        else:
            counted = TOKENS != PADDING
        assert (logits - expected)[counted].abs().max() < 1e-5 * max(1, float(expected.abs().max())), (kind, of)
        assert expected[counted].std() > 0.1
        back = {
            part: tensor
            for pair in pairs_of(model)
            for part, tensor in zip(pair.theirs, pair.split(weights[pair.ours]), strict=True)
        }
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[part], tensors[part]) for part in tensors)
        written = config_json(model, sequence_length=SEQUENCE, labels=LABELS)
        assert written["architectures"] == found["architectures"]
        assert transformers.AutoConfig.for_model(**written).id2label == dict(enumerate(LABELS))
        assert test_encoders.ours(written, tensors).classes == model.classes


@pytest.mark.parametrize(("name", "of"), [("gemma3", "tokens"), ("deepseek-v2", "tokens")])
def test_a_head_that_transformers_has_not_is_named(name: str, of: str) -> None:
    kind, values = test_families.MODELS[name]
    found = json.loads(getattr(transformers, f"{kind}Config")(**values).to_json_string())
    model = replace(test_families.ours(found), classes=ClassesConfig(number=3, of=Classified(of)))
    for refused in (pairs_of, partial(config_json, sequence_length=SEQUENCE)):
        with pytest.raises(UserError, match="has no class in transformers that tells classes of tokens"):
            refused(model)
