"""The named sizes: published parameter counts, and the shapes of `transformers`' model of the same description."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from launcher.config import load
from model.hf.families import FAMILIES, config_json
from model.size import parameter_count

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "model"
PUBLISHED = {  # rows of the vocabulary, parameters; GPT-3's are published rounded (125M, 350M ... 175B), ours are exact
    "gpt2-124m": (50257, 124_439_808),
    "gpt2-355m": (50257, 354_823_168),
    "gpt2-774m": (50257, 774_030_080),
    "gpt2-1.5b": (50257, 1_557_611_200),
    "gpt3-125m": (50257, 125_226_240),
    "gpt3-350m": (50257, 355_871_744),
    "gpt3-760m": (50257, 760_300_032),
    "gpt3-1.3b": (50257, 1_315_723_264),
    "gpt3-2.7b": (50257, 2_651_553_280),
    "gpt3-6.7b": (50257, 6_658_404_352),
    "gpt3-13b": (50257, 12_853_386_240),
    "gpt3-175b": (50257, 174_604_259_328),
    "llama-10m": (8192, 10_059_840),
    "llama-50m": (32000, 50_801_152),
    "llama2-7b": (32000, 6_738_415_616),
    "llama2-13b": (32000, 13_015_864_320),
    "llama2-70b": (32000, 68_976_648_192),
    "llama-1b": (128256, 1_235_814_400),
    "llama-3b": (128256, 3_212_749_824),
    "llama-8b": (128256, 8_030_261_248),
    "llama-70b": (128256, 70_553_706_496),
    "llama-405b": (128256, 405_853_388_800),
    "mistral-7b": (32000, 7_241_732_096),
    "mixtral-8x7b": (32000, 46_702_792_704),
    "qwen2-0.5b": (151936, 494_032_768),
    "qwen2-1.5b": (151936, 1_543_714_304),
    "qwen2-7b": (152064, 7_615_616_512),
    "qwen3-0.6b": (151936, 596_049_920),
    "qwen3-1.7b": (151936, 1_720_574_976),
    "qwen3-4b": (151936, 4_022_468_096),
    "qwen3-8b": (151936, 8_190_735_360),
    "qwen3-32b": (151936, 32_762_123_264),
    "pythia-14m": (50304, 14_067_712),
    "pythia-31m": (50304, 30_494_720),
    "pythia-70m": (50304, 70_426_624),
    "pythia-160m": (50304, 162_322_944),
    "pythia-410m": (50304, 405_334_016),
    "pythia-1b": (50304, 1_011_781_632),
    "pythia-1.4b": (50304, 1_414_647_808),
    "pythia-2.8b": (50304, 2_775_208_960),
    "pythia-6.9b": (50432, 6_857_302_016),
    "pythia-12b": (50688, 11_846_072_320),
    "gpt-neox-20b": (50432, 20_554_567_680),
    "gemma2-2b": (256000, 2_614_341_888),
    "gemma2-9b": (256000, 9_241_705_984),
    "gemma2-27b": (256000, 27_227_128_320),
    "gemma3-270m": (262144, 268_098_176),
    "gemma3-1b": (262144, 999_885_952),
    "gemma3-4b": (262208, 3_880_263_168),
    "gemma3-12b": (262208, 11_766_034_176),
    "gemma3-27b": (262208, 27_009_346_304),
    "deepseek-v2-lite": (102400, 15_706_484_224),
    "deepseek-v2-236b": (102400, 235_741_434_880),
    "deepseek-v3-671b": (129280, 671_026_419_200),
    "qwen3-moe-35m": (8192, 34_605_888),
    "qwen3-30b-a3b": (151936, 30_532_122_624),
    "qwen3-235b-a22b": (151936, 235_093_634_560),
    "bert-base": (30522, 110_106_428),
    "bert-large": (30522, 336_226_108),
    "t5-small": (32128, 76_961_152),
    "t5-base": (32128, 247_577_856),
    "t5-large": (32128, 783_150_080),
}


def test_every_named_size_is_held_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_count_and_shapes(name: str) -> None:
    rows, count = PUBLISHED[name]
    model = replace(load([CONFIGS / f"{name}.yaml"]).model, vocabulary_size=rows)
    assert parameter_count(model, rows, 1024) == count
    one = replace(
        model, layers=1 + model.moe.first_layer, decoder_layers=model.decoder_layers and 1
    )  # with a layer of each kind
    config = transformers.AutoConfig.for_model(**config_json(one, sequence_length=one.positions or 1024))
    with torch.device("meta"):
        reference = getattr(transformers, config.architectures[0])(config)
    theirs = reference.state_dict()
    if "lm_head.weight" in theirs:
        theirs["embed_out.weight"] = theirs["lm_head.weight"]  # what a file of GPT-NeoX calls it
    pairs = [
        pair for pair in FAMILIES[one.family].pairs(one) if "mlp.experts" not in pair.ours and "router" not in pair.ours
    ]
    joined = sum(pair.join([theirs[part] for part in pair.theirs]).numel() for pair in pairs)
    inner = one.moe.ffn_hidden_size or one.ffn_hidden_size
    biases = one.moe.experts if one.moe.expert_bias else 0
    mixture = one.moe.experts * (3 * inner + 1) * one.hidden_size + biases  # in memory theirs are fused
    assert joined + mixture == parameter_count(one, rows, 1024)
    # transformers 5 builds every T5 tied, and unties it when it reads a file that is not.
    untied = rows * one.hidden_size if one.decoder_layers and not one.tie_embeddings else 0
    assert sum(tensor.numel() for tensor in reference.parameters()) + untied + biases == parameter_count(
        one, rows, 1024
    )
