"""The adapters of a checkpoint alone, as `peft` reads them: adapter_model.safetensors and adapter_config.json.

`peft.PeftModel.from_pretrained(base, DIR)` puts them on the base model, wherever that is kept; where its name is known,
`peft.AutoPeftModelForCausalLM.from_pretrained(DIR)` finds it. An adapter of ours is
one of a projection, and so is one of `peft` where the family keeps projections apart. Where it has queries, keys and
values in one matrix (GPT-2, GPT-NeoX), theirs is one adapter of all ranks together: the A stand below each other, and
each B in columns of its own. A head for classes, which is trained besides, goes with them (`modules_to_save`).
"""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from launcher.config import RunConfig
from launcher.conversion.check import compare_logits, missing_transformers
from launcher.conversion.export import Weights, check_names, described_model, theirs
from launcher.conversion.in_memory import in_transformers
from launcher.outcome import Outcome
from launcher.places import find_step
from launcher.runtime import in_ranks
from launcher.verbs.conversion import ExportJob
from launcher.work import Ranks
from model.config import Classified, ModelConfig
from model.families import Architecture, begins_anew, family
from model.hf.families import pairs_of
from model.hf.pairs import Pair
from model.lora import in_turns, without
from model.projections import A, B, adapted, projections, scale
from parallel.checkpoint.manifest import Manifest
from parallel.checkpoint.stream import StoredTensors
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.lazy import Lazy

PEFT = Lazy("peft")
_TASKS = {Architecture.causal: "CAUSAL_LM", Architecture.encoder_decoder: "SEQ_2_SEQ_LM"}
_CLASSES = {Classified.texts: "SEQ_CLS", Classified.tokens: "TOKEN_CLS"}
_PREFIX = "base_model.model."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Theirs:
    """An adapter of a module of `transformers`."""

    module: str
    a: Tensor
    """[rank, inputs]."""
    b: Tensor
    """[outputs, rank]."""
    turned: bool
    """Whether the module keeps its matrix as [inputs, outputs]."""


def work(job: ExportJob) -> int:
    """Writes the directory; returns the exit code."""
    return in_ranks(lambda ranks: _exported(job, ranks), job.ranks)


def _exported(job: ExportJob, ranks: Ranks) -> Outcome:
    if job.check:
        missing_transformers()
        if not PEFT.is_installed:
            raise UserError("comparing logits needs peft: pip install 'bloomery[hf]', or call with --no-check.")
    config = job.checkpoint.config()
    tensors = Weights(StoredTensors(job.checkpoint.path), averaged=job.averaged)
    model = described_model(config, tensors)
    whole, tensors.merged = tensors.merged, None
    if whole is None:
        raise UserError(f"{job.checkpoint.path} has no adapters: its run was without model.lora.rank.")
    pairs = pairs_of(model)
    check_names(job.checkpoint.path, tensors, pairs)
    dtype: torch.dtype = getattr(torch, job.dtype)
    beside = job.output.with_name(f".{job.output.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        found = list(adapters(whole, pairs, tensors))
        base = job.base or base_of(config.checkpoint.load)
        write_adapters(beside, whole, pairs, found, heads(whole, pairs, tensors), dtype, base=base)
        if job.check:
            _compare(beside, config, whole, tensors, dtype)
        beside.rename(job.output)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if base is None:
        logger.warning("%s names no base model, for the run began with no import: --base NAME does", job.output)
    return Outcome(attempt=ranks.attempt, exit_code=0, message=f"exported the adapters to {job.output}")


def base_of(load: str | None) -> str | None:
    """What the frozen weights of a run that began with the checkpoint `load` were imported from; None if nobody knows.

    Where that run had adapters too, its frozen weights are those that it began with itself.
    """
    while load is not None:
        try:
            manifest = Manifest.read(find_step(load))
        except UserError:  # it is gone
            return None
        if "from" in manifest.layout:
            return manifest.layout["from"]
        adapted_too = manifest.config["model"].get("lora", {}).get("rank") is not None
        load = manifest.config["checkpoint"]["load"] if adapted_too else None
    return None


def adapters(model: ModelConfig, pairs: list[Pair], tensors: Weights) -> Iterator[Theirs]:
    """All of them; `model` is that with adapters."""
    for pair in pairs:
        path, _, kind = pair.ours.rpartition(".")
        name = path.rpartition(".")[2]
        having, fused = adapted(model, name), projections(model, name)
        if kind != "weight" or not having:
            continue
        assert fused is not None
        factors = {
            part.name: (tensors.read(f"{path}.{part.name}.{A}"), tensors.read(f"{path}.{part.name}.{B}"))
            for part in having
        }
        modules = [each.removesuffix(".weight") for each in pair.theirs]
        rows = sum(part.outputs for part in fused.parts)
        turned = pair.split(torch.empty(rows, 1, device="meta"))[0].shape[0] == 1
        if len(modules) == len(fused.parts):
            for module, part in zip(modules, fused.parts, strict=True):
                if part in having:
                    a, b = factors[part.name]
                    yield Theirs(module=module, a=a, b=b, turned=turned)
            continue
        (module,) = modules
        columns = torch.block_diag(*(b for _, b in factors.values()))  # [outputs of those that have one, ranks]
        apart = iter(columns.split([part.outputs for part in having]))
        b = in_turns([next(apart).T if part in having else None for part in fused.parts], fused, rows).T
        (b,) = pair.split(b)
        a = torch.cat([a for a, _ in factors.values()])
        yield Theirs(module=module, a=a, b=b.T if turned else b, turned=turned)


def heads(model: ModelConfig, pairs: list[Pair], tensors: Weights) -> dict[str, Tensor]:
    """What was trained besides, under their names: a head for classes."""
    anew = [pair for pair in pairs if begins_anew(model, pair.ours)]
    return dict(theirs(anew, tensors, torch.float32))


def write_adapters(
    directory: Path,
    model: ModelConfig,
    pairs: list[Pair],
    found: list[Theirs],
    besides: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    base: str | None = None,
) -> None:
    """Both files; `base` is the model that they are for, as `transformers` loads it."""
    tensors = {
        f"{_PREFIX}{each.module}.{name}.weight": tensor.to(dtype).contiguous()
        for each in found
        for name, tensor in ((A, each.a), (B, each.b))
    }
    tensors |= {f"{_PREFIX}{name}": tensor.to(dtype).contiguous() for name, tensor in besides.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    rank, factor = model.lora.rank, scale(model)
    assert rank is not None
    ranks = {_end(each.module): len(each.a) for each in found if len(each.a) != rank}
    said: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": _CLASSES[model.classes.of] if besides else _TASKS.get(family(model).architecture),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": factor * rank,
        "lora_dropout": model.lora.dropout,
        "target_modules": _targets(pairs, found),
        "rank_pattern": ranks,
        "alpha_pattern": {name: factor * number for name, number in ranks.items()},
        "fan_in_fan_out": any(each.turned for each in found),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in besides}) or None,
        "bias": "none",
        "inference_mode": True,
    }
    write_json(directory / "adapter_config.json", said)


def _targets(pairs: list[Pair], found: list[Theirs]) -> list[str]:
    """Ends of names where they mean the adapted modules and no other; else the whole names."""
    modules = {each.module for each in found}
    others = {name.removesuffix(".weight") for pair in pairs for name in pair.theirs} - modules
    ends = {_end(module) for module in modules}
    return sorted(modules if ends & {_end(other) for other in others} else ends)


def _end(module: str) -> str:
    return module.rpartition(".")[2]


def _compare(directory: Path, config: RunConfig, model: ModelConfig, tensors: Weights, dtype: torch.dtype) -> None:
    """Our model with its adapters beside its matrices, and that of `transformers` with those that were written."""
    base = in_transformers(config, without(model), tensors)
    reference = PEFT.PeftModel.from_pretrained(base, directory)
    names = tensors.names
    weights = {name: tensors.read(name) for name in names}
    weights |= {name: weights[name].to(dtype).float() for name in names if begins_anew(model, name)}
    compare_logits(model, weights, reference, sequence_length=config.train.sequence_length)
