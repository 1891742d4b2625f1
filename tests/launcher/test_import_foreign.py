"""Checkpoints that DeepSpeed and Megatron-LM wrote, with their own code, become ours to the last bit."""

import argparse
import json
import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import parse_args
from torch.overrides import TorchFunctionMode

from launcher import config as configuration
from launcher.conversion import importing
from launcher.conversion.check import our_outputs
from launcher.verbs.conversion import ImportJob, import_main
from launcher.verify.world import run_world
from launcher.work import Ranks
from model import megatron
from model.config import ModelConfig
from model.hf.families import FAMILIES
from model.hf.pairs import Pair, filled_up
from parallel import cpu
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError
from parallel.updater import Kind
from tests.launcher.tiny import configuration as make_configuration
from tests.launcher.tiny import ran

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

Values = dict[str, dict[str, torch.Tensor]]
"""By kind and the other program's name."""
TOKENS = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
LIMIT_SECONDS = 180


def imported(*arguments: str | Path) -> StoredTensors:
    """`bloomery checkpoint import` in a forked process."""
    work = import_main([str(argument) for argument in arguments])
    assert run_world(lambda: importing._imported(work.job, Ranks(attempt="test")).exit_code, 1) == [0]
    return StoredTensors(work.job.output / "checkpoints/step-00000000")


def model_of(output: Path) -> ModelConfig:
    """What an import wrote down of the model."""
    return configuration.load([output / "config.yaml"]).model


def assert_same(stored: StoredTensors, pairs: list[Pair], values: Values) -> None:
    """Every tensor is what the other program had, to the bit, in our shape."""
    assert stored.shapes.keys() == {f"{kind}.{pair.ours}" for kind in values for pair in pairs}
    for kind, tensors in values.items():
        for pair in pairs:
            wanted = pair.join([tensors[name] for name in pair.theirs])
            if kind is Kind.weight:
                wanted = filled_up(wanted, pair.filling)
            assert torch.equal(stored.read(f"{kind}.{pair.ours}"), wanted), (kind, pair.ours)


# DeepSpeed


def llama(directory: Path) -> transformers.PreTrainedModel:
    """A tiny model of `transformers`; its config.json goes to the directory."""
    config = transformers.LlamaConfig(
        vocab_size=380, hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(directory)
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(config)


def train_with_deepspeed(path: Path, stage: int, tensor: int, dtype: str) -> Values:
    """Two steps with two groups of parameters, as `transformers`' Trainer makes them; what DeepSpeed says it has."""
    rank = dist.get_rank()
    model = llama(path / str(rank))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "tensor_parallel": {"autotp_size": tensor},
    }
    if dtype != "fp32":
        settings[dtype] = {"enabled": True}
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    deepspeed.ops.__compatible_ops__ = {}  # no compiling: half a minute, and a lock that outlives a killed rank
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=settings, dist_init_required=False)
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + rank // tensor)
        tokens = torch.randint(0, 250, (2, 16), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(path))
    if stage < 3:  # DeepSpeed links moments that AdamW has not made yet, at the first step
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    parameters = dict(engine.module.named_parameters())
    return {
        Kind.weight: {name: safe_get_full_fp32_param(each).clone() for name, each in parameters.items()},
        **{
            kind: {name: safe_get_full_optimizer_state(each, kind.value).clone() for name, each in parameters.items()}
            for kind in (Kind.first_moment, Kind.second_moment)
        },
    }


def whole(parts: list[Values]) -> Values:
    """What AutoTP's ranks have together: matrices that read a cut width are cut by columns, others by rows."""
    found: Values = {}
    for kind, tensors in parts[0].items():
        found[kind] = {}
        for name, tensor in tensors.items():
            cut = re.search(r"(self_attn|mlp|lm_head)", name)
            axis = 1 if re.search(r"(o_proj|down_proj)", name) else 0
            found[kind][name] = torch.cat([part[kind][name] for part in parts], dim=axis) if cut else tensor
    return found


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Values]]:
    """Checkpoints by stage, ranks, tensor-parallel ranks and precision; each is made once."""
    made: dict[Any, tuple[Path, Values]] = {}

    def make(stage: int, ranks: int, tensor: int, dtype: str) -> tuple[Path, Values]:
        key = (stage, ranks, tensor, dtype)
        if key not in made:
            path = tmp_path_factory.mktemp("deepspeed")
            parts = run_world(train_with_deepspeed, ranks, path, stage, tensor, dtype, seconds=LIMIT_SECONDS)
            made[key] = path, whole(parts[:tensor]) if tensor > 1 else parts[0]
        return made[key]

    return make


@pytest.mark.parametrize(
    ("stage", "ranks", "tensor", "dtype"),
    [(1, 2, 1, "fp32"), (2, 3, 1, "bf16"), (3, 3, 1, "bf16"), (1, 4, 2, "fp32")],
    ids=["zero1-dp2", "zero2-dp3-bf16", "zero3-dp3-bf16", "zero1-tp2-dp2"],
)
def test_zero_becomes_ours_to_the_bit(
    zero: Callable[..., tuple[Path, Values]], tmp_path: Path, stage: int, ranks: int, tensor: int, dtype: str
) -> None:
    path, values = zero(stage, ranks, tensor, dtype)
    words = ("--format", "deepspeed", "--config", path / "0/config.json", "--output")
    stored = imported(path, *words, tmp_path / "run")
    model = model_of(tmp_path / "run")
    pairs = list(FAMILIES[model.family].pairs(model))
    assert_same(stored, pairs, values)
    weights = imported(path / "global_step2", *words, tmp_path / "weights", "--parts", "weights", "--no-check")
    assert_same(weights, pairs, {Kind.weight: values[Kind.weight]})


def test_training_goes_on_from_another_program_s_moments(
    zero: Callable[..., tuple[Path, Values]], tmp_path: Path, store: Path
) -> None:
    path, _ = zero(1, 2, 1, "fp32")
    words = ("--config", path / "0/config.json", "--output", tmp_path / "theirs", "--no-check")
    before = imported(path, "--format", "deepspeed", *words)
    model = configuration.to_dict(configuration.load([tmp_path / "theirs/config.yaml"]))["model"]
    assert (model["vocabulary_size"], model["unpadded_vocabulary_size"]) == (384, 380)
    optimizer = {"learning_rate": 1e-9, "betas": [0.9, 0.99], "clip_norm": 0.0, "schedule": {"name": "constant"}}
    config = make_configuration(tmp_path, store, model=model, optimizer=optimizer, train={"steps": 1})
    load = f"checkpoint.load={tmp_path / 'theirs'}"
    ran("train", config, load, "checkpoint.load_parts=weights_and_moments")
    step = tmp_path / "run/checkpoints/step-00000001"
    state = json.loads((step / "state.json").read_text())["schedule"]
    assert state["steps_taken"] == 1, "the schedule is this run's"
    assert state["loss_scale"]["steps_not_taken"] == -2, "the moments are older"
    after = StoredTensors(step)
    for name in ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.final_norm.weight"):
        assert torch.allclose(after.read(f"weight.{name}"), before.read(f"weight.{name}"), atol=1e-6)
        first, second = (after.read(f"{kind}.{name}").double() for kind in ("exp_avg", "exp_avg_sq"))
        gradient = (first - 0.9 * before.read(f"exp_avg.{name}")) / 0.1
        wanted = 0.99 * before.read(f"exp_avg_sq.{name}") + 0.01 * gradient.square()
        assert torch.allclose(second, wanted, rtol=1e-3, atol=1e-9), "both moments went on from theirs"
        assert before.read(f"exp_avg_sq.{name}").abs().max() > 0


# Megatron-LM


class OnCpu(TorchFunctionMode):
    """Tensors that Megatron-LM makes on the GPU are made here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


MEGATRON: dict[str, tuple[dict[str, int], list[str]]] = {
    "tp2": (
        {"tensor": 2},
        ["--position-embedding-type", "learned_absolute", "--add-qkv-bias", "--ffn-hidden-size", "80"],
    ),
    "ep2": (
        {"expert": 2},
        ["--position-embedding-type", "rope", "--rotary-base", "5000", "--normalization", "RMSNorm", "--swiglu",
         "--disable-bias-linear", "--group-query-attention", "--num-query-groups", "2", "--qk-layernorm",
         "--untie-embeddings-and-output-weights", "--num-experts", "4", "--moe-router-topk", "2",
         "--ffn-hidden-size", "48"],
    ),
}  # fmt: skip


@contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    """Megatron-LM's parser reads `sys.argv`, and uses what argparse will drop one day."""
    before, sys.argv = sys.argv, ["pretrain_gpt.py", *words]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        sys.argv = before


def arguments_of(words: list[str]) -> argparse.Namespace:
    """What Megatron-LM's own parser makes of a command line, all eight hundred of them."""
    common = {
        "num-layers": 2, "hidden-size": 48, "num-attention-heads": 4, "seq-length": 64, "micro-batch-size": 1,
        "max-position-embeddings": 64,
    }  # fmt: skip
    with command_line([word for name, value in common.items() for word in (f"--{name}", str(value))] + words):
        found = parse_args()
    found.padded_vocab_size = 250
    return found


def gpt(arguments: argparse.Namespace, layout: dict[str, int]) -> GPTModel:
    """The model that pretrain_gpt.py would make of these arguments, with larger weights."""
    moe = arguments.num_experts
    config = TransformerConfig(
        num_layers=arguments.num_layers,
        hidden_size=arguments.hidden_size,
        num_attention_heads=arguments.num_attention_heads,
        num_query_groups=arguments.num_query_groups if arguments.group_query_attention else None,
        ffn_hidden_size=arguments.ffn_hidden_size,
        add_bias_linear=arguments.add_bias_linear,
        add_qkv_bias=arguments.add_qkv_bias,
        normalization=arguments.normalization,
        qk_layernorm=arguments.qk_layernorm,
        gated_linear_unit=arguments.swiglu,
        activation_func=torch.nn.functional.silu if arguments.swiglu else _tanh_gelu,
        tensor_model_parallel_size=layout.get("tensor", 1),
        expert_model_parallel_size=layout.get("expert", 1),
        num_moe_experts=moe,
        moe_router_topk=arguments.moe_router_topk,
        moe_router_load_balancing_type="none",
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.2,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=moe, qk_layernorm=arguments.qk_layernorm, normalization=arguments.normalization
        ),
        vocab_size=arguments.padded_vocab_size,
        max_sequence_length=64,
        share_embeddings_and_output_weights=not arguments.untie_embeddings_and_output_weights,
        position_embedding_type=arguments.position_embedding_type,
        rotary_base=arguments.rotary_base,
        parallel_output=False,
    ).eval()


def _tanh_gelu(inputs: torch.Tensor) -> torch.Tensor:
    """What its fused GELU computes."""
    return torch.nn.functional.gelu(inputs, approximate="tanh")


def save_with_megatron(path: Path, arguments: argparse.Namespace, layout: dict[str, int]) -> torch.Tensor:
    """One step of Megatron-LM's optimizer, a save by its own code; the logits after it."""
    cpu.install()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.get("tensor", 1),
        expert_model_parallel_size=layout.get("expert", 1),
        expert_tensor_parallel_size=layout.get("tensor", 1),
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    with OnCpu():
        model = gpt(arguments, layout)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = FP32Optimizer(inner, OptimizerConfig(optimizer="adam", clip_grad=0.0), lambda *_: None)
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.main_grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        metadata = {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        state: dict[str, Any] = {"args": arguments, "checkpoint_version": 3.0, "iteration": 7}
        state["model"] = model.sharded_state_dict(metadata=metadata)
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], metadata=metadata)
        if dist.get_rank() == 0:
            path.mkdir(parents=True)
        dist.barrier()
        dist_checkpointing.save(state, str(path))
        # A rank of ours ends without Python's own ending, which would have stopped the writer's manager process.
        filesystem_async.get_write_results_queue()._manager.shutdown()  # type: ignore[attr-defined]
        length = TOKENS.shape[1]
        causal = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        with torch.no_grad():
            return model(TOKENS, torch.arange(length).repeat(len(TOKENS), 1), causal)


@pytest.fixture(scope="module")
def torch_dist(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, torch.Tensor]]:
    """Checkpoints by name; each is made once, with the logits of its model."""
    made: dict[str, tuple[Path, torch.Tensor]] = {}

    def make(name: str) -> tuple[Path, torch.Tensor]:
        if name not in made:
            layout, words = MEGATRON[name]
            path = tmp_path_factory.mktemp("megatron")
            (path / "latest_checkpointed_iteration.txt").write_text("7")
            answer = run_world(
                save_with_megatron, 2, path / "iter_0000007", arguments_of(words), layout, seconds=LIMIT_SECONDS
            )
            made[name] = path, answer[0]
        return made[name]

    return make


@pytest.mark.parametrize("name", MEGATRON)
def test_torch_dist_becomes_ours(
    torch_dist: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path, name: str
) -> None:
    """The same logits as Megatron-LM's model in its layout; moments to the bit, as the step made them of gradients."""
    path, wanted = torch_dist(name)
    stored = imported(path, "--format", "megatron", "--output", tmp_path / "run")
    model = model_of(tmp_path / "run")
    ours = [key.removeprefix("weight.") for key in stored.shapes if key.startswith("weight.")]
    weights = {name: stored.read(f"weight.{name}") for name in ours}
    batch = {
        "tokens": TOKENS,
        "positions": torch.arange(TOKENS.shape[1]).repeat(len(TOKENS), 1),
        "document_ids": torch.zeros(TOKENS.shape, dtype=torch.int32),
    }

    def computed() -> torch.Tensor:
        logits = our_outputs(model, weights, batch, sequence_length=64)
        assert isinstance(logits, torch.Tensor)
        return logits.detach().transpose(0, 1)

    (logits,) = run_world(computed, 1)
    assert torch.allclose(logits[..., :250], wanted, atol=1e-4 * float(wanted.abs().max()))
    for name in ours:
        first, second = stored.read(f"exp_avg.{name}"), stored.read(f"exp_avg_sq.{name}")
        assert torch.allclose(second, first.double().square().float() / 0.1**2 * 0.001, rtol=1e-5), name
    state = json.loads((tmp_path / "run/checkpoints/step-00000000/state.json").read_text())
    assert state["schedule"]["loss_scale"]["steps_not_taken"] == -1, "the optimizer's own count, not the iteration"


# What is wrong is named, and runs nothing


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def refused(tmp_path: Path, source: Path, *words: str | Path) -> str:
    """What an import says that fails, in this process; it leaves nothing."""
    work = import_main([str(word) for word in (source, "--output", tmp_path / "out", "--no-check", *words)])
    with pytest.raises(UserError) as caught:
        importing._opened(work.job)
    return str(caught.value)


def test_hostile_and_damaged_files_of_deepspeed(zero: Callable[..., tuple[Path, Values]], tmp_path: Path) -> None:
    path, _ = zero(1, 2, 1, "fp32")
    words = ("--format", "deepspeed", "--config", path / "0/config.json")
    files = sorted((path / "global_step2").glob("*.pt"))
    assert len(files) == 3
    target = tmp_path / "the payload ran"
    for number, file in enumerate(files):
        copy = shutil.copytree(path, tmp_path / f"copy-{number}")
        here = copy / "global_step2" / file.name
        content = here.read_bytes()
        torch.save({"module": Payload(target)}, here)
        assert re.search(rf"{file.name} is refused: it refers to (posix|os).mkdir", refused(tmp_path, copy, *words))
        here.write_bytes(pickle.dumps(Payload(target)))
        assert f"{file.name} is" in refused(tmp_path, copy, *words)
        here.write_bytes(os.urandom(len(content)))
        assert f"{file.name} is" in refused(tmp_path, copy, *words)
        here.write_bytes(content[: len(content) // 2])
        assert f"{file.name} is damaged" in refused(tmp_path, copy, *words)
        here.unlink()
        told = refused(tmp_path, copy, *words)
        assert "mp_rank_00" in told or "_model_states.pt" in told
    (path / "0/latest").write_text("../elsewhere")
    assert "'../elsewhere'" in refused(tmp_path, path / "0", *words)
    assert not target.exists()


def test_what_deepspeed_has_and_we_do_not_understand_is_named(
    zero: Callable[..., tuple[Path, Values]], tmp_path: Path
) -> None:
    path, _ = zero(1, 2, 1, "fp32")
    config = json.loads((path / "0/config.json").read_text())
    other = tmp_path / "config.json"
    for key, value, told in (
        ("num_hidden_layers", 3, "has no tensor model.layers.2."),
        ("num_hidden_layers", 1, "has a tensor model.layers.1."),
        ("mlp_bias", True, "mlp_bias"),
        ("model_type", "bloom", "model_type 'bloom'"),
    ):
        other.write_text(json.dumps({**config, key: value}))
        assert told in refused(tmp_path, path, "--format", "deepspeed", "--config", other)
    with pytest.raises(UserError, match=r"needs the model's config\.json"):
        import_main([str(path), "--format", "deepspeed", "--output", str(tmp_path / "out")])
    copy = shutil.copytree(path, tmp_path / "copy")
    shutil.copy(copy / "global_step2/mp_rank_00_model_states.pt", copy / "global_step2/layer_00-model_states.pt")
    assert "layer_00-model_states.pt is not understood" in refused(
        tmp_path, copy, "--format", "deepspeed", "--config", path / "0/config.json"
    )


def read_everything(job: ImportJob) -> None:
    """All that an import would read."""
    source = importing._opened(job).source
    for name in sorted(source.names):
        for kind in source.kinds:
            source.read(name, kind)


def test_hostile_and_damaged_files_of_megatron(
    torch_dist: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    path, _ = torch_dist("ep2")
    target = tmp_path / "the payload ran"
    copy = shutil.copytree(path, tmp_path / "copy") / "iter_0000007"
    words = ("--format", "megatron")
    for name, told in ((".metadata", r"\.metadata is refused"), ("__0_0.distcp", r"__0_0\.distcp is")):
        content = (copy / name).read_bytes()
        for hostile in (pickle.dumps(Payload(target)), b"garbage" * 50, content[: len(content) // 2]):
            (copy / name).write_bytes(hostile)
            work = import_main([str(copy.parent), *words, "--output", str(tmp_path / "out"), "--no-check"])
            with pytest.raises(UserError, match=told):
                read_everything(work.job)
        (copy / name).write_bytes(content)
    torch.save({"args": Payload(target)}, copy / "common.pt")
    assert re.search(r"common\.pt is refused: it refers to (posix|os)\.mkdir", refused(tmp_path, copy, *words))
    torch.save({"iteration": 7}, copy / "common.pt")
    assert "has no arguments" in refused(tmp_path, copy, *words)
    (copy / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "'zarr'" in refused(tmp_path, copy, *words)
    assert not target.exists()


def test_what_megatron_has_and_we_do_not_is_named(
    torch_dist: Callable[[str], tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    path, _ = torch_dist("tp2")
    arguments = vars(arguments_of(MEGATRON["tp2"][1]))
    assert megatron.model_values(arguments)["layers"] == 2
    for name, value in (("multi_latent_attention", True), ("rotary_percent", 0.5), ("padded_vocab_size", None)):
        with pytest.raises(UserError, match=name):
            megatron.model_values({**arguments, name: value})
    copy = shutil.copytree(path, tmp_path / "copy") / "iter_0000007"
    torch.save({"args": argparse.Namespace(**{**arguments, "num_layers": 3})}, copy / "common.pt")
    assert "has no tensor decoder.layers.2." in refused(tmp_path, copy, "--format", "megatron")
    torch.save({"args": argparse.Namespace(**{**arguments, "add_bias_linear": False})}, copy / "common.pt")
    assert "is not understood: decoder.layers.0." in refused(tmp_path, copy, "--format", "megatron")
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    stored = metadata.state_dict_metadata
    stored["optimizer.distributed.dp_group_idx_0.gbuf_idx_0.exp_avg"] = stored["decoder.final_layernorm.weight"]
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"args": argparse.Namespace(**arguments)}, copy / "common.pt")
    told = refused(tmp_path, copy, "--format", "megatron")
    assert "optimizer.distributed.dp_group_idx_0" in told
    assert "--dist-ckpt-optim-fully-reshardable" in told
    work = import_main([str(copy), "--format", "megatron", "--output", str(tmp_path / "out"), "--parts", "weights"])
    assert importing._opened(work.job).model.layers == 2
