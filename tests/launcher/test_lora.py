"""Adapters as a user trains and exports them, and against `peft` itself: same loss, same gradients, same logits."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from launcher.conversion import adapter, export
from launcher.conversion.adapter import Theirs, adapters, base_of, heads, write_adapters
from launcher.conversion.check import compare_logits, our_outputs
from launcher.conversion.export import Weights
from launcher.conversion.importing import model_name
from launcher.conversion.in_memory import in_transformers
from launcher.places import find_checkpoint
from launcher.verbs.conversion import export_main, import_main
from launcher.verify.batches import Traits
from launcher.verify.matrix import row
from launcher.verify.measure import Case, batch_of, engine_of
from launcher.verify.world import run_world
from launcher.work import Ranks
from model.config import Activation, FamilyName, LoraConfig, ModelConfig, Norm, Position
from model.hf.families import pairs_of
from model.lora import change, without
from model.projections import is_adapter
from model.size import flops_per_token, parameter_count
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError
from parallel.config import ParallelConfig
from parallel.engine import Engine
from tests.distributed.layouts import MODEL, VOCABULARY, tiny
from tests.launcher.test_conversion import in_process
from tests.launcher.test_exact_resume import stopped
from tests.launcher.test_finetune import conversations, written
from tests.launcher.test_train import records
from tests.launcher.tiny import ROOT, configuration, ran

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # peft asks transformers for it
]

LORA = LoraConfig(rank=3, alpha=6, initial_std=0.1)
GPT2 = replace(
    MODEL, family=FamilyName.gpt2, kv_heads=None, linear_bias=True, norm=Norm.layer, position=Position.learned,
    positions=16, activation=Activation.gelu, tie_embeddings=True,
)  # fmt: skip


class Held(Weights):
    """Tensors in memory, by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.merged, self.output_factor = tensors, None, 1.0
        self.names = list(tensors)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not is_adapter(name)}

    def _stored(self, name: str) -> Tensor:
        return self.tensors[name]


def gathered(engine: Engine, *, gradients: bool) -> dict[str, Tensor]:
    """Whole tensors of one rank: the weights, or the gradients of what is trained."""
    found = {}
    for local in engine.parameters if gradients else (*engine.parameters, *engine.frozen):
        value = engine.updater.gradient(local) if gradients else local.parameter.data
        for shard in local.shards:
            described = shard.description
            whole = found.setdefault(described.key, torch.zeros(described.global_shape))
            whole[described.global_slice()] = shard.of(value).view(described.local_shape)
    return found


@pytest.mark.truth
@pytest.mark.parametrize(
    "model",
    [
        replace(MODEL, lora=LORA),
        replace(MODEL, lora=replace(LORA, targets=["q_proj", "v_proj", "down_proj"])),
        replace(GPT2, lora=replace(LORA, targets=["q_proj", "v_proj", "o_proj", "up_proj"])),
    ],
    ids=["llama", "some", "gpt2"],
)
def test_loss_and_gradients_are_those_of_peft(model: ModelConfig, tmp_path: Path) -> None:
    case = tiny(zero_stage=0)
    case = replace(case, config=replace(case.config, model=model), traits=Traits(packed=False, unequal=False))
    (worst,) = run_world(lambda: apart(case, tmp_path), 1)
    assert worst.pop("loss") < 1e-6
    assert len(worst) > 10
    assert max(worst.values()) < 2e-5, worst


def apart(case: Case, directory: Path) -> dict[str, float]:
    """How far loss and gradients lie from those of `peft`, relative to their norms."""
    config, model = case.config, case.config.model
    engine = engine_of(case)
    batch = batch_of(case, 0, engine.topology)
    result = engine.accumulate(batch)
    tensors, gradients = Held(gathered(engine, gradients=False)), Held(gathered(engine, gradients=True))
    assert all(map(is_adapter, gradients.names)), "nothing else has a gradient"
    pairs = pairs_of(model)
    write_adapters(directory, model, pairs, list(adapters(model, pairs, tensors)), {}, torch.float32)
    base = in_transformers(config, without(model), tensors)
    reference: Any = peft.PeftModel.from_pretrained(base, directory, is_trainable=True)
    logits = reference.eval()(batch["tokens"]).logits
    loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    named = dict(reference.named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    found = {"loss": float(abs(result.loss - loss.detach()) / loss.detach())}
    for each in adapters(model, pairs, gradients):
        for letter, ours in (("A", each.a), ("B", each.b)):
            name = f"base_model.model.{each.module}.lora_{letter}.default.weight"
            found[name] = _distance(named[name].grad, ours, own=each)
            trained.remove(name)
    assert not trained, "peft trains nothing that we do not"
    return found


def _distance(expected: Tensor, ours: Tensor, own: Theirs) -> float:
    """Where several projections share one module of theirs, ours has the blocks of B, theirs also what lies beside."""
    mask = ours != 0 if ours is own.b and own.b.shape[1] > 3 else torch.ones_like(ours)
    return float((expected * mask - ours).norm() / ours.norm())


@pytest.mark.truth
@pytest.mark.parametrize(
    ("named", "override"),
    [
        ("pythia-14m", "precision=fp32"),
        ("gpt2-124m", "precision=fp32"),
        ("bert-base", "precision=fp32"),
        ("bert-base", "model.classes.number=3"),
        ("llama-10m", "model.classes={number: 3, of: tokens}"),
        ("t5-small", "precision=fp32"),
        ("gemma3-1b", "precision=fp32"),
        ("qwen3-moe-35m", "precision=fp32"),
    ],
)
def test_every_kind_of_family_is_exported_both_ways(named: str, override: str, tmp_path: Path) -> None:
    files = [str(ROOT / "configs" / "model" / f"{named}.yaml")]
    config = row(named, files, ["model.lora.rank=8", "model.lora.alpha=4", override], 1).proofs[0].config
    assert run_world(lambda: both_ways(Case(config=config, ranks=1), tmp_path), 1) == [None]


def both_ways(case: Case, directory: Path) -> None:
    """Compares our model, adapters beside its matrices, with theirs, merged and by `peft`; raises where they differ."""
    model = case.config.model
    case = replace(case, config=replace(case.config, parallel=ParallelConfig(zero_stage=0)))
    tensors = Held(gathered(engine_of(case), gradients=False))
    pairs = pairs_of(without(model))
    besides = heads(model, pairs, tensors)
    assert bool(besides) == bool(model.classes.number)
    write_adapters(directory, model, pairs, list(adapters(model, pairs, tensors)), besides, torch.float32)
    base = in_transformers(case.config, without(model), tensors)
    for name in besides:
        parameter = base.get_parameter(name)
        parameter.data = torch.zeros_like(parameter)  # of another task; the memory is that of `tensors`
    apart = peft.PeftModel.from_pretrained(base, directory)
    compare_logits(model, tensors.tensors, apart, sequence_length=case.config.train.sequence_length)
    tensors.merged = model
    merged = in_transformers(case.config, without(model), tensors)
    compare_logits(model, tensors.tensors, merged, sequence_length=case.config.train.sequence_length)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """The run of a pretrained model."""
    directory = tmp_path_factory.mktemp("base")
    sections = {"train": {"steps": 60, "global_batch_size": 8}, "checkpoint": {"every_steps": 60}}
    ran("train", configuration(directory, store, **sections))
    return directory / "run"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    """Conversations, of which the base model has seen none."""
    directory = tmp_path_factory.mktemp("chats")
    file, output = written(directory / "chat.jsonl", conversations(60)), directory / "store"
    ran("data", "examples", file, "--tokenizer", store, "--output", output, "--validation-share", "0.2")
    return output


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, chats: Path, base: Path) -> Path:
    """The adapters that learnt them on two tensor ranks; the directory of configuration and run."""
    directory = tmp_path_factory.mktemp("tuned")
    train = {"objective": "answers", "sequence_length": 64}
    config = adapting(directory, chats, base, train=train, parallel={"tensor": 2}, optimizer={"learning_rate": 2e-2})
    said = ran("train", config, ranks=2)
    assert "trained: 3.71K of them (8.5 %)" in said
    return directory


def adapting(directory: Path, store: Path, base: Path | None, **sections: Any) -> Path:
    directory.mkdir(exist_ok=True)
    start = {} if base is None else {"checkpoint": {"load": str(base), "load_parts": "weights"}}
    return configuration(
        directory, store, **{"model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.05}}, **start, **sections}
    )


def exported(*arguments: str | Path) -> None:
    work: Any = export_main([str(argument) for argument in arguments])
    module = {each.__name__: each for each in (export, adapter)}[work.module]
    assert run_world(lambda: module._exported(work.job, Ranks(attempt="test")).exit_code, 1) == [0]


def test_frozen_matrices_keep_every_bit_and_have_no_state(base: Path, tuned: Path) -> None:
    before = StoredTensors(base / "checkpoints" / "step-00000060")
    after = StoredTensors(tuned / "run" / "checkpoints" / "step-00000012")
    weights = {name for name in before.shapes if name.startswith("weight.")}
    learnt = after.shapes.keys() - before.shapes.keys()
    assert weights <= after.shapes.keys()
    assert all(torch.equal(before.read(name), after.read(name)) for name in weights)
    assert all(is_adapter(name) for name in learnt)
    assert {name.partition(".")[2] for name in after.shapes if name.startswith("exp_avg.")} == {
        name.partition(".")[2] for name in learnt if name.startswith("weight.")
    }
    assert all(after.read(name).any() for name in learnt)


def test_adapters_learn(tuned: Path) -> None:
    found = [record["loss"] for record in records(tuned)]
    assert found[-1] < 0.75 * found[0]


def test_a_stopped_run_goes_on_with_the_same_bits(tuned: Path) -> None:
    copy = stopped(tuned, tuned / "config.yaml", 4)
    ran("train", tuned / "config.yaml", f"run.dir={copy}", ranks=2)
    assert records(copy.parent) == records(tuned)


@pytest.mark.truth
def test_merged_and_apart_they_are_what_was_trained(base: Path, tuned: Path, tmp_path: Path) -> None:
    exported(base, "--output", tmp_path / "base")
    exported(tuned / "run", "--output", tmp_path / "merged")
    exported(tuned / "run", "--output", tmp_path / "adapter", "--adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    tokens = torch.randint(0, 380, (2, 32), generator=torch.Generator().manual_seed(0))
    (ours,) = run_world(lambda: live(tuned / "run", tokens), 1)
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        before = load(tmp_path / "base")(tokens).logits
        merged = load(tmp_path / "merged")(tokens).logits
        by_peft = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")(tokens).logits
    largest = float(ours.abs().max())
    assert float((before - ours).abs().max()) > 1e-2 * largest, "they do something"
    assert float((merged - ours).abs().max()) < 1e-6 * largest
    assert float((by_peft - ours).abs().max()) < 1e-6 * largest


def test_adapters_of_an_import_name_their_base(base: Path, tuned: Path, store: Path, tmp_path: Path) -> None:
    exported(base, "--output", tmp_path / "hf")
    assert in_process(import_main, tmp_path / "hf", "--output", tmp_path / "imported", "--no-check") == 0
    config = adapting(tmp_path / "first", store, tmp_path / "imported", train={"steps": 4})
    said = ran("train", tmp_path / "imported" / "model.yaml", config)
    more = adapting(tmp_path / "more", store, tmp_path / "first" / "run", train={"steps": 4})
    said = ran("train", tmp_path / "imported" / "model.yaml", more)
    exported(tmp_path / "more" / "run", "--output", tmp_path / "adapter", "--adapter")
    tokens = torch.randint(0, 380, (2, 32), generator=torch.Generator().manual_seed(0))
    (ours,) = run_world(lambda: live(tmp_path / "more" / "run", tokens), 1)
    with torch.no_grad():
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(tokens).logits
    assert float((theirs - ours).abs().max()) < 1e-6 * float(ours.abs().max())
    assert base_of(str(base)) is base_of(str(tmp_path / "gone")) is None
    arguments = (tuned / "run", "--output", tmp_path / "named", "--base", "org/name")
    exported(*arguments, "--adapter", "--no-check")
    said = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "org/name"
    with pytest.raises(UserError, match="--base is for --adapter"):
        export_main(list(map(str, arguments)))
    assert model_name(Path("/home/me/.cache/hub/models--Qwen--Qwen3-0.6B/snapshots/c1")) == "Qwen/Qwen3-0.6B"


@torch.no_grad()
def live(path: Path, tokens: Tensor) -> Tensor:
    """Logits of our model with its adapters beside its matrices, [batch, sequence, vocabulary]."""
    found = find_checkpoint(str(path))
    stored, config = Weights(StoredTensors(found.path)), found.config()
    model = replace(config.model, vocabulary_size=stored.shapes["embedding.word_embeddings.weight"][0])
    batch = {
        "tokens": tokens,
        "positions": torch.arange(tokens.shape[1]).repeat(len(tokens), 1),
        "document_ids": torch.zeros(tokens.shape, dtype=torch.int32),
    }
    outputs = our_outputs(model, {name: stored.read(name) for name in stored.names}, batch, sequence_length=32)
    assert isinstance(outputs, Tensor)
    return outputs.transpose(0, 1)


@pytest.mark.truth
def test_the_mean_of_adapters_is_that_of_the_merged_matrices(base: Path, tuned: Path, tmp_path: Path) -> None:
    places = [f"{tuned / 'run'}@8", f"{tuned / 'run'}@12", str(base)]
    said = ran("checkpoint", "average", *places, "--output", tmp_path / "mean")
    assert "adapters merged" in said

    def compare() -> None:
        ours = Weights(StoredTensors(find_checkpoint(str(tmp_path / "mean")).path))
        parts = [Weights(StoredTensors(find_checkpoint(place).path)) for place in places]
        model = find_checkpoint(places[0]).config().model
        assert not any(map(is_adapter, ours.names))
        for name in ours.names:
            total = sum(part.read(name).double() for part in parts)
            for part in parts[:2]:
                added = change(model, name, part.read)
                total = total if added is None else total + added
            torch.testing.assert_close(ours.read(name), (total / 3).float(), rtol=1e-6, atol=1e-7)

    assert run_world(compare, 1) == [None]
    assert find_checkpoint(str(tmp_path / "mean")).config().model.lora.rank is None
    said = ran("evaluate", tmp_path / "mean")


def test_evaluation_and_generation_know_adapters(tuned: Path) -> None:
    said = ran("evaluate", tuned / "run")
    found = json.loads((tuned / "run" / "evaluation.json").read_text())
    said = ran("evaluate", tuned / "run", "--ranks", "2", "--json", tuned / "two.json", ranks=2)
    assert json.loads((tuned / "two.json").read_text()) == found
    said = ran("generate", tuned / "run", "--prompt", "iron ore", "--tokens", "4")
    assert "iron ore" in said


def test_what_makes_no_sense_is_refused_in_one_sentence(base: Path, tuned: Path, store: Path, tmp_path: Path) -> None:
    some = {"lora": {"rank": 4, "alpha": 8, "targets": ["q_prj"]}}
    experts = {"lora": {"rank": 4, "targets": ["up_proj"]}, "moe": {"experts": 4}}
    deep = {"lora": {"rank": 4}, "latent": {"kv_rank": 8, "rope_head_size": 4}, "head_size": 8, "kv_heads": None}
    everything = {"checkpoint": {"load": str(base)}}
    for number, (origin, sections, sentence) in enumerate(
        (
            (None, {}, "checkpoint.load is None: expected a checkpoint with model.lora.rank"),
            (base, {"model": some}, "model.lora.targets is 'q_prj': expected q_proj, if that was meant"),
            (base, {"model": experts}, "expected some of q_proj, k_proj, v_proj, o_proj: experts have no adapters"),
            (base, {"model": deep}, "model.lora.rank is 4: expected null with model.latent"),
            (base, everything, "checkpoint.load_parts is 'everything': expected weights"),
            (
                base,
                {"model": {"lora": {"rank": 4, "dropout": 1}}},
                "model.lora.dropout is 1.0: expected a share from 0",
            ),
            (base, {"model": {"lora": {"rank": 0}}}, "model.lora.rank is 0: expected a number above 0"),
            (tuned / "run", {"model": {"lora": {"rank": 4}}}, "model.lora.alpha is None: expected 8.0, as"),
            (tuned / "run", {"model": {}}, "holds adapters, and model.lora.rank is null"),
            (base, {"parallel": {"pipeline": 2, "pipeline_split": [2, 0]}}, "a stage without any has nothing to train"),
        )
    ):
        ranks = 2 if "parallel" in sections else 1
        said = ran("train", adapting(tmp_path / str(number), store, origin, **sections), ranks=ranks, code=2)
        assert sentence in said
        assert not (tmp_path / str(number) / "run").exists()
    said = ran("checkpoint", "export", base, "--adapter", "--output", tmp_path / "out", code=2)
    assert "has no adapters" in said
    assert not (tmp_path / "out").exists()


def test_counts_by_hand() -> None:
    """Of a block: q, o [32, 32], k, v [16, 32], gate and up [48, 32], down [32, 48]; rank 3."""
    adapted, plain = replace(MODEL, lora=LORA), MODEL
    more = 3 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3) * MODEL.layers
    assert parameter_count(adapted, VOCABULARY) - parameter_count(plain, VOCABULARY) == more
    engines = run_world(lambda: _counts(replace(tiny(), config=replace(tiny().config, model=adapted))), 1)
    assert engines == [(more, parameter_count(plain, VOCABULARY))]
    matrices = parameter_count(plain, VOCABULARY) - (2 * MODEL.layers + 1) * 32 - VOCABULARY * 32
    before, after = (flops_per_token(model, VOCABULARY, 16, causal=True) for model in (plain, adapted))
    assert after - before == 6 * more - 2 * matrices


def _counts(case: Case) -> tuple[int, int]:
    engine = engine_of(case)
    trained, frozen = (sum(local.shape.numel() for local in each) for each in (engine.parameters, engine.frozen))
    return trained, frozen
