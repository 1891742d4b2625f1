"""`bloomery submit`: a run as a Slurm job; `sbatch` with checked flags on slurm/train.sbatch.

The quick half, and all of it: it imports no torch. `launcher.slurm.submission` makes the line.
"""

import argparse
import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher import config as configuration
from launcher.config import RunConfig
from launcher.places import find_step
from launcher.run_directory import RunDirectory
from launcher.slurm.config import ranks_per_node, slurm_problems
from launcher.slurm.submission import SCRIPTS, control_problems, directory_problems, job_environment, sbatch
from launcher.start import repository_environment
from launcher.validate import check_training
from launcher.verbs.train import positive, split
from parallel.common.errors import ConfigError, Problem, UserError

_EPILOG = """\
examples:
  bloomery submit my-run.yaml --nodes 8 --gpus-per-node 8 --partition gpu --time 12h
  bloomery submit my-run.yaml --nodes 2 --ranks-per-node 2 --dry-run       shows the sbatch line, submits nothing
  bloomery submit my-run.yaml --nodes 8 --chain 4                          four jobs, one after the other
  bloomery submit my-run.yaml --sweep rates.txt --at-once 2                one run for each line of key=value words

Flags stand for keys of the section `slurm` (--time is slurm.time), which may stand in a CONFIG too. The job goes on by
itself after its time limit, preemption, a lost node or a killed rank; `bloomery status RUN` says how it does."""

_FLAGS: dict[str, tuple[str, str]] = {
    "partition": ("NAME", "where to run"),
    "account": ("NAME", "who pays"),
    "qos": ("NAME", "quality of service"),
    "reservation": ("NAME", "run inside this reservation"),
    "constraint": ("FEATURES", "features that the nodes must have"),
    "time": ("LIMIT", "time limit: 90m, 12h, 2d, HH:MM:SS or D-HH:MM:SS"),
    "gpus_per_node": ("[TYPE:]N", "GPUs, and so ranks, of each node"),
    "memory": ("SIZE", "host memory of each node; 0 is all of it"),
}
_NUMBERS = {
    "nodes": "nodes of the job",
    "ranks_per_node": "ranks on each node (default: its GPUs, else 1)",
    "cpus_per_node": "CPU cores for all ranks of a node",
    "lead_seconds": "how long before the limit the run saves and stops (default: 300)",
}


def main(arguments: Sequence[str]) -> int:
    """Parses `CONFIG... [flags] [key=value ...]`, checks everything, calls sbatch."""
    options = _parser().parse_intermixed_args(list(arguments))
    _refuse([*control_problems([*options.config, str(options.sweep or "")])])
    files, overrides = split(options.config)
    config = configuration.load(files, overrides)
    given = {name: getattr(options, name) for name in (*_FLAGS, *_NUMBERS) if getattr(options, name) is not None}
    if options.exclude is not None:
        given["exclude"] = options.exclude.split(",")
    slurm = replace(config.slurm, **given)
    runs = [config] if options.sweep is None else _sweep(files, overrides, options.sweep)
    directory = configuration.run_directory(config)
    problems = [*slurm_problems(slurm), *directory_problems(directory)]
    _check([replace(run, slurm=slurm) for run in runs], problems)
    log = directory.resolve() / "logs" / ("slurm-%A-%a.out" if options.sweep else "slurm-%j.out")
    sweep = options.sweep.resolve() if options.sweep is not None else None
    environment = job_environment(slurm, repository_environment(), sweep=sweep)
    line = sbatch(
        slurm,
        script=SCRIPTS / "train.sbatch",
        name=config.run.name,
        log=log,
        words=options.config,
        environment=environment,
        chained=options.chain is not None,
        array=f"0-{len(runs) - 1}%{options.at_once or len(runs)}" if options.sweep is not None else None,
    )
    if options.dry_run:
        print(shlex.join(line))
        return 0
    log.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(options.chain or 1):
        job = _submit(line, environment)
        for run in runs:
            configuration.run_directory(run).joinpath("logs").mkdir(parents=True, exist_ok=True)
            RunDirectory(configuration.run_directory(run)).jobs.append({"job": job, "time": time.time()})
        print(f"submitted job {job}: {directory}, output in {log.parent}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bloomery submit",
        description="Trains as a Slurm job, or as several.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value overrides")
    for name, meaning in _NUMBERS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=positive, metavar="N", help=meaning)
    for name, (shape, meaning) in _FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar=shape, help=meaning)
    parser.add_argument("--exclude", metavar="NODES", help="nodes to stay away from, with commas between them")
    parser.add_argument("--chain", type=positive, metavar="K", help="K jobs, each of which goes on where one ended")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="a job array: line by line key=value words of a run")
    parser.add_argument("--at-once", type=positive, metavar="N", help="tasks of the array that run at the same time")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch line and stop")
    return parser


def _check(runs: Sequence[RunConfig], problems: list[Problem]) -> None:
    """Everything that `bloomery train` would refuse on the job's nodes, before anyone waits in a queue."""
    names = [str(configuration.run_directory(run).resolve()) for run in runs]
    if len(set(names)) < len(names):
        problems.append(Problem(key="run.name", got=runs[0].run.name, legal="another one in each line of the sweep"))
    for run in runs:
        try:
            check_training(run, ranks=max(1, run.slurm.nodes * ranks_per_node(run.slurm)))
        except ConfigError as error:
            problems += error.problems
    _refuse(problems)
    for run in runs:
        if run.checkpoint.load is not None:
            find_step(run.checkpoint.load)


def _refuse(problems: Sequence[Problem]) -> None:
    if problems:
        raise ConfigError(problems)


def _sweep(files: Sequence[str], overrides: Sequence[str], sweep: Path) -> list[RunConfig]:
    if not sweep.is_file():
        raise UserError(f"{sweep} does not exist: expected a file with the key=value words of one run in each line.")
    lines = sweep.read_text().splitlines()
    if not lines or not all(line.split() for line in lines):
        raise UserError(f"{sweep} has an empty line or none at all: expected key=value words in each.")
    return [configuration.load(files, [*overrides, *line.split()]) for line in lines]


def _submit(line: Sequence[str], environment: dict[str, str]) -> str:
    try:
        done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError("there is no sbatch on this machine: call this where Slurm's commands are.") from error
    if done.returncode != 0:
        raise UserError(f"sbatch refused: {done.stderr.strip().removeprefix('sbatch: error: ')}")
    return done.stdout.strip().partition(";")[0]
