"""A tiny corpus, a tiny model and the command line as a user calls it: what every test of the launcher stands on."""

import gc
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers  # so that forked ranks find it imported
import yaml

import launcher.evaluation.bits_per_byte  # so that forked ranks find it imported
import launcher.generation.work
import launcher.train  # noqa: F401
from data_pipeline import tokenizer
from data_pipeline.store import StoreWriter, TokenizedDocument
from data_pipeline.tokenizer import Tokenizer
from launcher import changes, cli, config
from launcher.outcome import Outcome
from launcher.run_directory import RunDirectory
from parallel.checkpoint import manifest

ROOT = Path(__file__).resolve().parent.parent.parent
_WORDS = ("iron", "ore", "charcoal", "bellows", "furnace", "slag", "hammer", "fire", "clay", "smith", "air", "heat")
DOCUMENTS = 60
assert transformers
changes.code_files()  # read once, so that nobody who edits a file meanwhile makes the next fork a changed run
config.load([])  # so that forked ranks find its tables made, and versions looked up
changes.versions(), manifest.versions()


def texts(source: str, count: int = DOCUMENTS) -> list[str]:
    """Documents that can be learnt: few words, in an order with some sense."""
    chosen = random.Random(source)
    return [" ".join(chosen.choice(_WORDS) for _ in range(chosen.randint(20, 120))) + "\n" for _ in range(count)]


def make_store(path: Path) -> Path:
    """A finished store with the sources `code` and `prose`; a tenth of each is for validation."""
    return store_of(path, {source: texts(source) for source in ("code", "prose")})


def store_of(path: Path, by_source: Mapping[str, Sequence[str]]) -> Path:
    """A finished store of some texts; a tenth of each source is for validation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = tokenizer.train(
        (text for documents in by_source.values() for text in documents), 384, path.parent / "tokenizer.json"
    )
    writer = StoreWriter(path, tokenizer=trained, configuration="tiny")
    for source, documents in by_source.items():
        held_out = len(documents) // 10
        for split, chosen in (("training", documents[held_out:]), ("validation", documents[:held_out])):
            writer.add_shard(source, split, _tokenized(trained, source, chosen))
    writer.finish()
    return path


def _tokenized(trained: Tokenizer, source: str, chosen: Sequence[str]) -> Iterator[TokenizedDocument]:
    for index, (text, ids) in enumerate(zip(chosen, trained.encode_batch(chosen), strict=True)):
        yield TokenizedDocument(id=f"{source}-{index}", tokens=ids, text_bytes=len(text.encode()))


def configuration(directory: Path, store: Path, **sections: dict[str, Any] | list[str]) -> Path:
    """A configuration file of a run that takes a second; `sections` are merged into its own."""
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(directory / "run")},
        "model": {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "ffn_hidden_size": 48},
        "train": {
            "steps": 12,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "sequence_length": 32,
            "log_every_steps": 1,
        },
        "precision": "fp32",
        "optimizer": {"learning_rate": 1e-2, "schedule": {"warmup_steps": 2}},
        "data": {"store": str(store)},
        "checkpoint": {"every_steps": 4, "keep": 8},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def outcome_of(directory: Path) -> Outcome:
    """How the run in a directory says that it ended."""
    found = Outcome.read(RunDirectory(directory / "run").outcome)
    assert found is not None
    return found


@contextmanager
def in_layout(run: Path, layout: Mapping[str, int]) -> Iterator[None]:
    """A finished run whose configuration has another layout for a while."""
    config = run / "config.yaml"
    kept = config.read_text()
    config.write_text(yaml.safe_dump({**yaml.safe_load(kept), "parallel": dict(layout)}))
    try:
        yield
    finally:
        config.write_text(kept)


def bloomery(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m launcher ARGUMENTS` to its end."""
    return subprocess.run(
        command(*arguments), env=environment(), text=True, capture_output=True, timeout=300, **options
    )


def command(*arguments: str | Path) -> list[str]:
    """The command line of a verb."""
    return [sys.executable, "-P", "-m", "launcher", *map(str, arguments)]


def environment() -> dict[str, str]:
    """What a subprocess needs to find this repository."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@dataclass(kw_only=True)
class Started:
    """Ranks of one `bloomery` call, forked from a parent that has imported everything: 0.3 s instead of 8."""

    processes: list[int]
    output: Path

    def wait(self) -> list[int]:
        """Exit codes (negative: the signal), in the order of the ranks."""
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in self.processes]
        self.processes = []
        return codes

    def send(self, number: int) -> None:
        """A signal to every rank."""
        for process in self.processes:
            os.kill(process, number)

    def said(self) -> str:
        """What all ranks printed."""
        return self.output.read_text()


def start(
    *arguments: str | Path,
    ranks: int = 1,
    faults: Mapping[int, str] = MappingProxyType({}),
    meeting: Mapping[str, str] = MappingProxyType({}),
) -> Started:
    """Forks the ranks of `bloomery ARGUMENTS`, as torchrun would start them; `wait` for them, whatever happens.

    Args:
        faults: by rank, what happens to it and at which point (`parallel.common.faults`).
        meeting: variables that say where the ranks meet, other than what torchrun would say.
    """
    output = Path(tempfile.mkstemp(prefix="bloomery-test-")[1])
    found = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(ranks),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    found |= meeting
    processes = []
    for rank in range(ranks):
        names = {**found, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        if rank in faults:
            names["BLOOMERY_FAULT"] = faults[rank]
        processes.append(_fork(list(map(str, arguments)), names, output))
    return Started(processes=processes, output=output)


def _free_port() -> int:
    """Below those that the system gives to anyone who connects: nobody takes it before rank 0 does."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def run(*arguments: str | Path, ranks: int = 1, **started_with: Any) -> tuple[list[int], str]:
    """Exit codes and output of `bloomery ARGUMENTS` on forked ranks."""
    started = start(*arguments, ranks=ranks, **started_with)
    codes = started.wait()
    said = started.said()
    started.output.unlink()
    return codes, said


def ran(*arguments: str | Path, ranks: int = 1, code: int = 0, **started_with: Any) -> str:
    """What `bloomery ARGUMENTS` says on forked ranks, all of which end with `code`."""
    codes, said = run(*arguments, ranks=ranks, **started_with)
    assert codes == [code] * ranks, f"exit codes {codes}:\n{said}"
    return said


def _fork(arguments: list[str], names: dict[str, str], output: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        # Python warns of any fork beside threads; the parent has run none of OpenMP's (tests/conftest.py).
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process:
        return process
    code = 1
    gc.freeze()
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        sys.stdout, sys.stderr = (os.fdopen(standard, "w", closefd=False) for standard in (1, 2))
        os.environ.update(names)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
        torch.set_num_threads(1)
        code = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
