"""Hugging Face models in and out, as a user does it: same logits, same bits, nothing half-written."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from launcher import config as configuration
from launcher.conversion import export, importing
from launcher.places import find_checkpoint
from launcher.verbs.conversion import export_main, import_main
from launcher.verify.world import run_world
from launcher.work import Ranks
from parallel.common.errors import UserError
from tests.launcher.tiny import configuration as make_configuration
from tests.launcher.tiny import ran, run

pytestmark = pytest.mark.distributed

TOKENS = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def in_process(main: Callable[[Sequence[str]], Any], *arguments: str | Path) -> int:
    """A conversion in a forked process, which has a process group of its own as the command has."""
    work = main([str(argument) for argument in arguments])
    module = {"launcher.conversion.export": export, "launcher.conversion.importing": importing}[work.module]
    act = module._exported if module is export else module._imported
    (outcome,) = run_world(lambda: act(work.job, Ranks(attempt="test")).exit_code, 1)
    return outcome


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("theirs") / "model"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=250, hidden_size=48, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def test_export_of_an_import_is_the_same_bit_for_bit(theirs: Path, tmp_path: Path) -> None:
    assert in_process(import_main, theirs, "--output", tmp_path / "run") == 0
    assert find_checkpoint(str(tmp_path / "run")).manifest.step == 0
    assert in_process(export_main, tmp_path / "run", "--output", tmp_path / "back") == 0
    before, after = load_file(theirs / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(path).eval()(TOKENS).logits
        for path in (theirs, tmp_path / "back")
    )
    assert torch.equal(first, second)


def test_a_model_in_several_files(theirs: Path, tmp_path: Path) -> None:
    assert in_process(import_main, theirs, "--output", tmp_path / "run", "--no-check") == 0
    small = ("--shard-gigabytes", "0.00003", "--dtype", "bfloat16")
    assert in_process(export_main, tmp_path / "run", "--output", tmp_path / "back", *small) == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert sorted({*index["weight_map"].values()}) == [file.name for file in files]
    assert len(files) > 3
    assert all(file.stat().st_size < 80_000 for file in files)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert in_process(import_main, tmp_path / "back", "--output", tmp_path / "again") == 0


def test_a_trained_run_is_exported_with_its_tokenizer(tmp_path: Path, store: Path) -> None:
    config = make_configuration(tmp_path, store, train={"steps": 4})
    ran("train", config, ranks=1)
    assert in_process(export_main, tmp_path / "run", "--output", tmp_path / "hf") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    text = "iron ore charcoal"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size >= len(tokenizer)
    answer = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4)
    assert answer.shape[1] > 3


def test_an_import_trains_on(theirs: Path, tmp_path: Path, store: Path) -> None:
    """Its model block is a configuration's, and its weights are where a run starts."""
    assert in_process(import_main, theirs, "--output", tmp_path / "imported", "--no-check") == 0
    model = configuration.load([tmp_path / "imported" / "config.yaml"]).model
    assert configuration.load([tmp_path / "imported" / "model.yaml"]).model == model
    assert replace(model, vocabulary_size=None).hidden_size == 48
    assert model.vocabulary_size == 256
    assert model.unpadded_vocabulary_size == 250


@pytest.mark.truth
def test_an_imported_model_reads_first_what_its_own_tokenizer_puts_there(theirs: Path, tmp_path: Path) -> None:
    words = ("<unk>", "<s>", "</s>", "iron", "ore", "clay", "fire", *(f"w{number}" for number in range(243)))
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    shutil.copytree(theirs, tmp_path / "hf")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "hf")
    assert in_process(import_main, tmp_path / "hf", "--output", tmp_path / "run") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    read = tokenizer("iron ore clay", return_tensors="pt", return_token_type_ids=False)
    found = model.generate(**read, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    written = tokenizer.decode(found[: found.index(2)] if 2 in found else found)
    prompt = ("--prompt", "iron ore clay", "--tokens", "6", "--json", tmp_path / "written.json")
    codes, said = run("generate", tmp_path / "run", *prompt)
    assert codes == [0], said
    assert json.loads((tmp_path / "written.json").read_text())[0]["continuation"].split() == written.split()


def broken(theirs: Path, tmp_path: Path, change: Callable[[Path], None]) -> str:
    """What an import says of a changed copy; nothing may stand where it would have written."""
    copy, output = tmp_path / "copy", tmp_path / "out" / "run"
    shutil.copytree(theirs, copy)
    change(copy)
    with pytest.raises(UserError) as error:
        in_process(import_main, copy, "--output", output)
    left = [path for path in output.parent.rglob("*") if path.is_file()] if output.parent.exists() else []
    assert not left
    return str(error.value)


def rewrite(name: str | None, value: torch.Tensor | None) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        if value is None:
            del tensors[str(name)]
        else:
            tensors[str(name)] = value
        save_file(tensors, directory / "model.safetensors")

    return change


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def garbage(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"garbage" * 100)


def other_size(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_key_value_heads": 6}))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (rewrite("model.layers.1.mlp.up_proj.weight", None), "has no tensor model.layers.1.mlp.up_proj.weight"),
        (rewrite("model.layers.0.extra.weight", torch.zeros(3)), "has a tensor model.layers.0.extra.weight"),
        (pickled, "pytorch_model.bin would run code"),
        (garbage, "model.safetensors is damaged"),
        (other_size, "shapes that do not fit the model's description"),
    ],
    ids=["missing", "beyond", "pickled", "garbage", "other-shape"],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(
    theirs: Path, tmp_path: Path, change: Callable[[Path], None], told: str
) -> None:
    assert told in broken(theirs, tmp_path, change)


def test_the_words_of_the_command_line(theirs: Path, tmp_path: Path) -> None:
    """Both ways as a user calls them (`make docs-test` does so in processes of their own)."""
    said = ran("checkpoint", "import", theirs, "--output", tmp_path / "run")
    said = ran("checkpoint", "export", tmp_path / "run", "--output", tmp_path / "back")
    assert "logits as transformers computes them" in said
    said = ran("checkpoint", "exprot", code=2)
    assert "did you mean export?" in said


def test_an_output_that_exists_is_not_touched(theirs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        import_main([str(theirs), "--output", str(tmp_path)])


def test_a_wrong_conversion_is_not_declared_a_success(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two halves of a gated matrix exchanged: names and shapes fit, only the logits tell."""
    monkeypatch.setattr("model.hf.llama.halves", _exchanged)
    with pytest.raises(UserError, match="the logits differ"):
        in_process(import_main, theirs, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _exchanged(ours: str, names: tuple[str, str]) -> Any:
    return importing.Pair(
        ours=ours,
        theirs=names,
        split=lambda tensor: tensor.chunk(2)[::-1],
        join=lambda tensors: torch.cat([tensors[1], tensors[0]]),
    )
