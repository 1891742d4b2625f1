"""What changed between two attempts at one run, and which changes a run bears.

A changed key, package or source file is shown, kept in `history.jsonl`, and refused where it would silently make
another run of this one, once a step was saved. What someone changes on purpose is allowed by its name:
`checkpoint.allow_changes=[optimizer.learning_rate, code]`. Which samples come next is not ours to allow: the loader
refuses another order, because a place in one means nothing in another. Imports without torch.
"""

import difflib
import json
import logging
import platform
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launcher import config as configuration
from launcher import plugins
from launcher.config import RunConfig
from launcher.run_directory import RunDirectory
from parallel.common.errors import ConfigError, Problem
from parallel.common.files import hash_bytes, hash_file

logger = logging.getLogger(__name__)

Changes = Mapping[str, tuple[Any, Any]]
"""{name: (before, now)}: a dotted key, `versions.PACKAGE`, or `code`, whose values are hashes."""

CODE, VERSIONS = "code", "versions"
_FREE = (
    "run.name", "run.dir", "parallel.", "train.micro_batch_size", "train.log_every_steps", "train.profile_",
    "checkpoint.", "evaluate.",
    "tracking.", "slurm.", "data.sources", "data.store", "data.stages.", "data.tokenizer.", "data.validation.",
    "data.shard_tokens", "watchdog.", "anomaly.",
)  # fmt: skip
"""Keys that change neither the samples nor the numbers that are computed from them, rounding apart. What the store was
built from is the store's own matter: the loader refuses another one."""
_NEVER = ("run.seed", "train.sequence_length", "data")
"""They decide the order of the samples."""
_PACKAGES = ("torch", "megatron-core", "deepspeed")
_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("data_pipeline/**/*.py", "model/**/*.py", "parallel/**/*.py", "launcher/assemble.py", "launcher/train.py")
"""Code that decides the numbers of a run; the rest of the launcher shows and starts them."""


@cache
def _own_files() -> dict[str, str]:
    files = sorted(path for pattern in _SOURCES for path in _ROOT.glob(pattern))
    return {path.relative_to(_ROOT).as_posix(): hash_file(path) for path in files}


@cache
def code_files(plugged: tuple[str, ...] = ()) -> dict[str, str]:
    """{file: xxh3-128} of the code that decides the numbers of a run, plugins' included, as it is when first asked."""
    own = plugins.files(plugged)
    return _own_files() | {f"plugins/{name}": hash_file(path) for name, path in sorted(own.items())}


def code_hash(files: Mapping[str, str]) -> str:
    """One hash of them all."""
    return hash_bytes(json.dumps(dict(sorted(files.items()))).encode())


@cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def since_last_attempt(directory: RunDirectory, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Everything that differs from the last attempt at the run; empty where this is the first."""
    found = directory.differences(config)
    attempts = list(directory.history)
    if attempts:
        before, now = attempts[-1]["versions"], versions()
        packages = (name for name in _PACKAGES if before.get(name) != now[name])
        found |= {f"{VERSIONS}.{name}": (before.get(name), now[name]) for name in packages}
    recorded = directory.recorded_code()
    now = code_files(tuple(config.plugins))
    if recorded and recorded != now:
        found[CODE] = (code_hash(recorded), code_hash(now))
    return found


def check(directory: RunDirectory, config: RunConfig) -> None:
    """Refuses what would silently make another run of this one, once a step was saved.

    With what code a finished run would go on does not matter any more.

    Raises:
        ConfigError: with every change that must not be, or that is allowed by a name that does not exist.
    """
    problems = list(_unknown(config))
    if directory.has_checkpoint():
        finished = directory.finished(config)
        changes = directory.differences(config) if finished else since_last_attempt(directory, config)
        refused = {name: values for name, values in changes.items() if not _borne(name, config)}
        problems += [_refusal(directory, name, *values, config=config) for name, values in refused.items()]
    if problems:
        raise ConfigError(problems)


def show(changes: Changes, directory: RunDirectory, config: RunConfig) -> None:
    """Says what changed, one line each."""
    for name, (before, now) in changes.items():
        if name == CODE:
            logger.info("changed since the last attempt: the code, in %s", ", ".join(changed_files(directory, config)))
        else:
            logger.info("changed since the last attempt: %s from %r to %r", name, before, now)


def changed_files(directory: RunDirectory, config: RunConfig) -> list[str]:
    """Source files that the last attempt had otherwise, or did not have, or that are gone."""
    before, now = directory.recorded_code(), code_files(tuple(config.plugins))
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))


def _borne(name: str, config: RunConfig) -> bool:
    if name.startswith(_FREE):
        return True
    return not _within(name, _NEVER) and _within(name, config.checkpoint.allow_changes)


def _within(name: str, allowed: tuple[str, ...] | list[str]) -> bool:
    return any(name == word or name.startswith(f"{word}.") for word in allowed)


def _refusal(directory: RunDirectory, name: str, before: Any, now: Any, *, config: RunConfig) -> Problem:
    because, allowed = "", f"checkpoint.allow_changes=[{name}]"
    if name == CODE:
        files = changed_files(directory, config)
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        now, before = f"changed in {', '.join(files[:4])}{more}", f"the code of {directory.path}"
        return Problem(key=name, got=now, legal=f"{before}, or {allowed}")
    if name in ("train.steps", "train.tokens"):
        because = " (the learning rate follows from the length of the run, so another length is another run)"
    if _within(name, _NEVER):
        allowed = "a new run.name, which may take the weights with checkpoint.load"
        because = " (it decides which samples come next)"
    return Problem(key=name, got=now, legal=f"{before!r} as in {directory.path}, a new run.name, or {allowed}{because}")


def _unknown(config: RunConfig) -> Iterator[Problem]:
    """Names that are allowed and do not exist: a slip there would allow nothing and say nothing."""
    keys = [*configuration.flatten(configuration.to_dict(config)), *(f"{VERSIONS}.{name}" for name in _PACKAGES)]
    sections = {key.rsplit(".", depth)[0] for key in keys for depth in range(key.count(".") + 1)}
    known = {CODE, VERSIONS, *keys, *sections}
    for name in config.checkpoint.allow_changes:
        if _within(name, _NEVER):
            legal = "a key that does not decide the order of the samples; take a new run.name, and checkpoint.load"
            yield Problem(key="checkpoint.allow_changes", got=name, legal=legal)
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            legal = f"{near[0]}, if that was meant" if near else f"a key of the configuration, {CODE} or {VERSIONS}"
            yield Problem(key="checkpoint.allow_changes", got=name, legal=legal)
