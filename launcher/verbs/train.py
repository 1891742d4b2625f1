"""`bloomery train`: reads and checks everything, answers for a run that is finished, starts the ranks.

The quick half: it imports no torch. `launcher.train` has the loop.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.following import open_store
from launcher import changes
from launcher import config as configuration
from launcher.adapters import check_adapters
from launcher.config import RunConfig
from launcher.length import total_steps
from launcher.places import find_step
from launcher.run_directory import Lock, RunDirectory
from launcher.slurm.shrink import in_fewer_ranks
from launcher.start import available_ranks, start_ranks
from launcher.validate import check_training
from launcher.watchdog.config import WatchdogConfig
from launcher.work import Ranks, Work, from_environment, is_first_rank
from parallel.common.errors import UserError

_EPILOG = """\
examples:
  bloomery train configs/quickstart.yaml run.name=first --ranks 2
  bloomery train configs/model/llama-1b.yaml my-run.yaml optimizer.learning_rate=3e-4
  torchrun --nproc-per-node 8 -m launcher train my-run.yaml
  srun python -m launcher train my-run.yaml

The same command goes on where a run stopped. Exit codes: 0 finished, 2 your input needs a change,
75 saved after TERM or USR1 and to be requeued, 130 saved after Ctrl-C."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """One attempt at a run, checked and ready."""

    config: RunConfig
    directory: Path
    ranks: Ranks
    debug_rank: int | None = None
    """The rank that waits for a debugger."""

    @property
    def watchdog(self) -> WatchdogConfig:
        """As configured; nobody is watched while a person thinks at a prompt."""
        configured = self.config.watchdog
        return configured if self.debug_rank is None else replace(configured, limit_seconds=None)


def main(arguments: Sequence[str]) -> int | Work:
    """Parses `CONFIG... [key=value ...] [--ranks N] [--debug-rank R] [--print-config]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery train",
        description="Trains a model, or goes on where the run stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value overrides")
    parser.add_argument(
        "--ranks", type=positive, help="start this many local ranks (default: the accelerators, else 1)"
    )
    parser.add_argument(
        "--debug-rank", type=int, metavar="R", help="rank R waits for a debugger before its first step, and at an error"
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration and stop")
    options = parser.parse_intermixed_args(list(arguments))
    files, overrides = split(options.config)
    config = configuration.load(files, overrides)
    if options.print_config:
        print(configuration.as_yaml(config), end="")
        return 0
    ranks = from_environment()
    wanted = ranks_to_start(ranks, options.ranks)
    debug = options.debug_rank
    if debug is not None and not 0 <= debug < wanted:
        raise UserError(f"--debug-rank is {debug}: expected one of the {wanted} ranks of this call, 0 to {wanted - 1}.")
    config, directory = prepared(config, ranks=wanted)
    path = directory.path
    if directory.finished(config):
        if is_first_rank():
            print(f"{path} is finished: {total_steps(config)} steps. Another run.name starts a new run.")
        return 0
    path.mkdir(parents=True, exist_ok=True)
    if wanted > ranks.world_size:
        debugging = [] if debug is None else ["--debug-rank", str(debug)]
        return start_ranks(["train", *options.config, *debugging], ranks=wanted)
    job = TrainJob(config=config, directory=path, ranks=ranks, debug_rank=debug)
    return Work(module="launcher.train", job=job, rank=ranks.rank, logs=directory.logs)


def prepared(config: RunConfig, *, ranks: int) -> tuple[RunConfig, RunDirectory]:
    """All that can be checked before a rank starts; the configuration in the layout that fits, and its run.

    Raises:
        UserError: this run cannot be trained on so many ranks, or not now.
    """
    if config.slurm.shrink:
        config = in_fewer_ranks(config, ranks)
    check_training(config, ranks=ranks)
    check_training(config, ranks=ranks, store=open_store(config.data))
    directory = RunDirectory(configuration.run_directory(config))
    changes.check(directory, config)
    if not directory.has_checkpoint():
        check_adapters(config, None if config.checkpoint.load is None else find_step(config.checkpoint.load))
    Lock.check_free(directory.lock)
    return config, directory


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files and `key=value` overrides, told apart by the `=`; a file whose name has one needs a `/` before it."""
    overrides = [word for word in words if "=" in word and "/" not in word.partition("=")[0]]
    return [word for word in words if word not in overrides], overrides


def ranks_to_start(present: Ranks, asked: int | None) -> int:
    """How many ranks shall compute: those that torchrun or srun started, else `--ranks`, else the accelerators.

    Raises:
        UserError: `--ranks` stands inside a job whose ranks were started already.
    """
    if present.rendezvous == "alone":
        return asked if asked is not None else available_ranks()
    if asked not in (None, present.world_size):
        raise UserError(
            f"--ranks {asked} was given under {present.rendezvous}, which has started {present.world_size} ranks "
            "already: leave --ranks out."
        )
    return present.world_size


def positive(text: str) -> int:
    """A number of ranks.

    Raises:
        ValueError: it is not a whole number above 0 (argparse tells the user).
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
