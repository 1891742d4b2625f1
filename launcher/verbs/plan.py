"""`bloomery plan`: which layout a model should have on a machine, what it needs, how long it takes, what it costs.

Arithmetic alone: no accelerator, no torch, a second for 1,024 accelerators.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from omegaconf import MISSING

from data_pipeline.config import DataConfig
from launcher import config as configuration
from launcher.config import RunConfig, RunSection
from launcher.length import total_steps
from launcher.plan import show
from launcher.plan.facts import Facts, unknown
from launcher.plan.hardware import load, names
from launcher.plan.search import Judged, Search
from launcher.plan.setting import Setting
from launcher.validate import check_training
from launcher.verbs.explain import embedding_rows
from launcher.verbs.train import positive, split
from parallel.common.errors import UserError
from parallel.common.files import write_json, write_text
from parallel.common.units import format_bytes
from parallel.config import ParallelConfig, Precision

_EPILOG = """\
examples:
  bloomery plan configs/model/llama-8b.yaml my-run.yaml --nodes 8 --hardware h100
  bloomery plan my-run.yaml --nodes 128 --hardware my-cluster.yaml --price 2.1 --output layout.yaml
  bloomery train my-run.yaml layout.yaml

A hardware file is YAML as those under configs/hardware. Exit codes: 0 planned, 2 your input needs a change, or no
layout fits."""


def main(arguments: Sequence[str]) -> int:
    """Parses `CONFIG... [key=value ...] --nodes N --hardware NAME|FILE ...`, searches and prints."""
    parser = argparse.ArgumentParser(
        prog="bloomery plan",
        description="Searches the layouts of a model on a machine: memory, time, utilisation, days and cost of the "
        "best, and why others are not.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value overrides")
    parser.add_argument("--nodes", type=positive, default=1, help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=positive, default=8, help="accelerators of a machine (default 8)")
    parser.add_argument("--hardware", required=True, metavar="NAME|FILE", help=f"{', '.join(names())}, or a YAML file")
    parser.add_argument("--price", type=float, metavar="DOLLARS", help="of one accelerator's hour")
    parser.add_argument("--top", type=positive, default=5, help="how many layouts to show (default 5)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the best layout here, as `train` takes it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here too")
    options = parser.parse_intermixed_args(list(arguments))
    for file in (options.output, options.json):
        if file is not None and not file.resolve().parent.is_dir():
            raise UserError(f"{file.resolve().parent} is not a directory: --output and --json want a file in one.")
    config = _complete(configuration.load(*split(options.config)))
    setting = _setting(config, options)
    tokens = _tokens(config)
    plan = Search(config, setting).plan(options.top)
    if not plan.best:
        raise UserError(_nothing_fits(plan.least, setting))
    for line in show.lines(plan, setting, tokens):
        print(line)
    if options.json is not None:
        write_json(options.json, show.as_dict(plan, setting, tokens))
    if options.output is not None:
        chosen = plan.best[0].setting
        about = f"{setting.ranks // setting.node_ranks} x {setting.node_ranks} {setting.hardware.name}"
        heading = f"# {show.in_words(chosen)}; bloomery plan for {about}\n"
        write_text(options.output, heading + yaml.safe_dump(show.overrides(chosen), sort_keys=False))
        print(f"\n{options.output}: bloomery train CONFIG... {options.output}")
    return 0


def _complete(given: RunConfig) -> RunConfig:
    """With what a layout does not depend on filled in; checked, but for the layout."""
    has_length = given.train.steps is not None or given.train.tokens is not None
    config = RunConfig(
        run=RunSection(name="plan"),
        model=given.model,
        train=given.train if has_length else replace(given.train, steps=given.optimizer.schedule.warmup_steps + 1000),
        parallel=given.parallel,
        precision=given.precision,
        optimizer=given.optimizer,
        data=DataConfig(store=given.data.store if given.data.store != MISSING else "none"),
    )
    one = replace(config.train, micro_batch_size=1) if config.train.micro_batch_size > 0 else config.train
    check_training(replace(config, parallel=ParallelConfig(), train=one), ranks=1)
    rows = embedding_rows(given)
    missing = unknown(config.model, rows)
    if missing is not None:
        raise UserError(f"bloomery plan does not know {missing} yet: `bloomery explain` measures what a layout holds.")
    return replace(config, model=replace(config.model, vocabulary_size=rows))


def _setting(config: RunConfig, options: argparse.Namespace) -> Setting:
    hardware = load(options.hardware)
    if options.price is not None:
        if not options.price > 0:
            raise UserError(f"--price is {options.price}: expected a number above 0.")
        hardware = replace(hardware, dollars_per_hour=options.price)
    assert config.model.vocabulary_size is not None
    facts = Facts.of(
        config.model,
        vocabulary_size=config.model.vocabulary_size,
        sequence_length=config.train.sequence_length,
        optimizer=config.optimizer,
    )
    return Setting(
        facts=facts,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=1,
        layout=ParallelConfig(),
        ranks=options.nodes * options.gpus_per_node,
        node_ranks=options.gpus_per_node,
        precision=Precision.bf16 if config.precision in (Precision.auto, Precision.fp8) else config.precision,
        matrix_precision="fp8" if config.precision is Precision.fp8 else None,
        hardware=hardware,
        packed=config.data.mask_documents,
    )


def _tokens(config: RunConfig) -> int:
    """Of the whole run."""
    return total_steps(config) * config.train.global_batch_size * config.train.sequence_length


def _nothing_fits(least: Judged | None, setting: Setting) -> str:
    machine = f"{setting.ranks} x {setting.hardware.name}"
    if least is None:
        return (
            f"no layout of this model on {machine} is legal with batches of {setting.global_batch_size} samples: "
            "take a larger train.global_batch_size or fewer nodes."
        )
    return (
        f"no layout of this model fits on {machine}: the nearest ({show.in_words(least.setting)}, full recompute) "
        f"needs {format_bytes(least.over_bytes)} more on a rank than there is. Take more nodes or more memory."
    )
