"""`bloomery checkpoint export`, `import` and `average`: to and from other files, and several checkpoints into one.

The quick half: it imports no torch. `launcher.conversion` streams the tensors, on one rank whatever wrote them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from launcher.places import Checkpoint, find_checkpoint
from launcher.work import Ranks, Work, from_environment
from parallel.common.errors import UserError
from parallel.config import LoadParts

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportJob:
    """A checkpoint to be written as safetensors."""

    checkpoint: Checkpoint
    output: Path
    dtype: str
    shard_bytes: int
    """Largest file of tensors."""
    check: bool
    ranks: Ranks
    averaged: bool = False
    """The average of the weights over the steps instead of the weights."""
    base: str | None = None
    """Of adapters alone: the model that they are for, as `transformers` loads it."""


class ImportFormat(StrEnum):
    """Whose files an import reads."""

    hf = "hf"
    """Hugging Face: config.json and safetensors."""
    deepspeed = "deepspeed"
    """ZeRO's shards of a model of `transformers`."""
    megatron = "megatron"
    """Megatron-LM's `torch_dist`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportJob:
    """Another program's files to become a checkpoint."""

    source: Path
    format: ImportFormat
    config: Path | None
    """The config.json of a model under DeepSpeed."""
    parts: LoadParts
    output: Path
    check: bool
    ranks: Ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class AverageJob:
    """Checkpoints of one model whose mean becomes a checkpoint."""

    checkpoints: tuple[Checkpoint, ...]
    output: Path
    ranks: Ranks


def average_main(arguments: Sequence[str]) -> Work:
    """Parses `CHECKPOINT CHECKPOINT... --output DIR`."""
    parser = argparse.ArgumentParser(
        prog="bloomery checkpoint average",
        description="Makes a run whose one checkpoint has the mean of the weights of several; evaluate, generate and "
        "export take it, and training starts from it with checkpoint.load=OUTPUT checkpoint.load_parts=weights",
        epilog="example: bloomery checkpoint average first@1000 first@2000 first@3000 --output runs/first-mean",
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="step directory, run, or RUN@STEP")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a directory that does not exist yet")
    options = parser.parse_args(list(arguments))
    if len(options.checkpoints) < 2:
        raise UserError(f"{options.checkpoints[0]} alone has no mean: name two checkpoints or more.")
    checkpoints = tuple(find_checkpoint(each) for each in options.checkpoints)
    job = AverageJob(checkpoints=checkpoints, output=_new(options.output), ranks=_alone("average"))
    return Work(module="launcher.conversion.averaging", job=job, rank=0, logs=checkpoints[0].run.logs)


def export_main(arguments: Sequence[str]) -> Work:
    """Parses `CHECKPOINT --output DIR [--format hf] [--dtype D] [--shard-gigabytes N] [--no-check] [--average]
    [--adapter [--base NAME]]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery checkpoint export",
        description="Writes a checkpoint's weights as safetensors with config.json and tokenizer, which "
        "transformers.AutoModelForCausalLM.from_pretrained(DIR) reads; success is said after its logits were compared.",
        epilog="example: bloomery checkpoint export first --format hf --output first-hf --dtype bfloat16",
    )
    parser.add_argument("checkpoint", help="a step directory, a run (its newest step), or RUN@STEP")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument("--format", choices=("hf",), default="hf", help="hf: Hugging Face (default)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the tensors (default float32: exact)")
    parser.add_argument("--shard-gigabytes", type=float, default=5.0, metavar="N", help="largest file (default 5)")
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare logits (takes memory)")
    parser.add_argument(
        "--average", action="store_true", help="the average of the weights over the steps (optimizer.average_decay)"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="the adapters alone (model.lora), as peft.PeftModel.from_pretrained(BASE, DIR) reads them; without this "
        "they are merged into the weights",
    )
    parser.add_argument(
        "--base",
        metavar="NAME",
        help="with --adapter: the model that they are for, a name of the hub or a directory (default: what the run's "
        "weights were imported from)",
    )
    options = parser.parse_args(list(arguments))
    if options.base is not None and not options.adapter:
        raise UserError("--base is for --adapter: merged weights need no other model.")
    checkpoint = find_checkpoint(options.checkpoint)
    job = ExportJob(
        checkpoint=checkpoint,
        output=_new(options.output),
        dtype=options.dtype,
        shard_bytes=max(1, round(options.shard_gigabytes * 1e9)),
        check=options.check,
        ranks=_alone("export"),
        averaged=options.average,
        base=options.base,
    )
    module = "launcher.conversion.adapter" if options.adapter else "launcher.conversion.export"
    return Work(module=module, job=job, rank=0, logs=checkpoint.run.logs)


def import_main(arguments: Sequence[str]) -> Work:
    """Parses `PATH --output DIR [--format hf|deepspeed|megatron] [--config FILE] [--parts P] [--no-check]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery checkpoint import",
        description="Makes a run whose step 0 has the weights of another program's model, and its moments where they "
        "are there; any layout loads it, to go on with pretraining: bloomery train CONFIG... checkpoint.load=OUTPUT "
        "checkpoint.load_parts=weights (or weights_and_moments)",
        epilog="example: bloomery checkpoint import ~/models/Llama-3.2-1B --output runs/llama-3.2-1b",
    )
    parser.add_argument("source", type=Path, metavar="PATH", help="the directory that the other program wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a directory that does not exist yet")
    parser.add_argument(
        "--format",
        type=ImportFormat,
        choices=tuple(ImportFormat),
        default=ImportFormat.hf,
        help="hf: config.json and safetensors (default); deepspeed: a ZeRO checkpoint of a model of transformers; "
        "megatron: a torch_dist checkpoint of Megatron-LM",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="deepspeed: the model's config.json (PATH/config.json by default)"
    )
    parser.add_argument(
        "--parts",
        type=LoadParts,
        choices=(LoadParts.everything, LoadParts.weights),
        default=LoadParts.everything,
        help="weights: leave moments out (default: everything that is there)",
    )
    parser.add_argument("--no-check", dest="check", action="store_false", help="do not compare logits (takes memory)")
    options = parser.parse_args(list(arguments))
    output = _new(options.output)
    job = ImportJob(
        source=options.source,
        format=options.format,
        config=_config(options.source, options.format, options.config),
        parts=options.parts,
        output=output,
        check=options.check,
        ranks=_alone("import"),
    )
    return Work(module="launcher.conversion.importing", job=job, rank=0, logs=output.parent / "logs")


def _config(source: Path, kind: ImportFormat, given: Path | None) -> Path | None:
    """The config.json that says what the tensors are.

    Raises:
        UserError: there is none, or none is asked for.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a directory.")
    if kind is not ImportFormat.deepspeed:
        if given is not None:
            raise UserError(f"--config is for --format deepspeed: {kind.value} files describe their model themselves.")
        if kind is ImportFormat.hf and not (source / "config.json").is_file():
            raise UserError(f"{source} is not a Hugging Face model: expected a directory with a config.json.")
        return None
    config = given or source / "config.json"
    if not config.is_file():
        raise UserError(
            f"{config} does not exist: a DeepSpeed checkpoint needs the model's config.json (--config FILE)."
        )
    return config


def _new(output: Path) -> Path:
    if output.exists():
        raise UserError(f"{output} exists already: give --output a directory that does not.")
    return output


def _alone(verb: str) -> Ranks:
    ranks = from_environment()
    if ranks.world_size > 1:
        raise UserError(f"{verb} works on one rank: call it without torchrun or srun.")
    return ranks
