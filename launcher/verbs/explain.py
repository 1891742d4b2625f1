"""`bloomery explain`: reads and checks a layout; `launcher.explain.work` says what it does.

The quick half: it imports no torch. Everything runs on this machine's CPU, whatever accelerators it has.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.store import Store
from launcher import config as configuration
from launcher.config import RunConfig
from launcher.verbs.train import positive, split
from launcher.verbs.verify import ON_THE_CPU
from launcher.verify.shrink import complete
from launcher.work import Work, from_environment
from parallel.common.errors import UserError
from parallel.config import Precision

_EPILOG = """\
examples:
  bloomery explain configs/quickstart.yaml --ranks 2
  bloomery explain configs/model/llama-8b.yaml my-run.yaml parallel.tensor=4 --ranks 64 --json layout.json

The row marked > is yours. Bytes are computed from your model's shapes, and beside them stand those of small copies,
computed and measured. Exit codes: 0 explained, 1 computed and measured differ, 2 the layout is illegal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainJob:
    """A layout to explain, complete and legal."""

    config: RunConfig
    ranks: int
    precision: Precision
    vocabulary_size: int
    measure: bool
    json: Path | None
    scratch: tempfile.TemporaryDirectory
    """For what libraries say; gone with the process."""


def main(arguments: Sequence[str]) -> int | Work:
    """Parses `CONFIG... [key=value ...] [--ranks N] [--json FILE] [--no-measure]`."""
    parser = argparse.ArgumentParser(
        prog="bloomery explain",
        description="What your layout really does: what runs, what is sharded, when gradients are reduced, which "
        "collectives a step has, and the bytes that a rank holds, for your model and beside every other ZeRO stage.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="+", help="YAML files, merged left to right, and key=value overrides")
    parser.add_argument(
        "--ranks", type=positive, help="explain the layout of this many ranks (default: 2 data parallel)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it here too")
    parser.add_argument("--no-measure", action="store_true", help="only compute; start no small copies")
    options = parser.parse_intermixed_args(list(arguments))
    if from_environment().world_size > 1:
        raise UserError("bloomery explain starts its ranks itself: call it alone, not under torchrun or srun.")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise UserError(f"{options.json.resolve().parent} is not a directory: --json wants a file in one.")
    given = configuration.load(*split(options.config))
    config, ranks = complete(given, options.ranks)
    os.environ.update(ON_THE_CPU)
    scratch = tempfile.TemporaryDirectory(prefix="bloomery-explain-")
    job = ExplainJob(
        config=config,
        ranks=ranks,
        precision=Precision.bf16 if config.precision in (Precision.auto, Precision.fp8) else config.precision,
        vocabulary_size=embedding_rows(given),
        measure=not options.no_measure,
        json=options.json,
        scratch=scratch,
    )
    return Work(module="launcher.explain.work", job=job, rank=0, logs=Path(scratch.name))


def embedding_rows(config: RunConfig) -> int:
    """Rows of the embedding: the model's, else the store's where it stands already, else those it will have."""
    if config.model.vocabulary_size is not None:
        return config.model.vocabulary_size
    store = Path(config.data.store)
    if (store / "manifest.jsonl").is_file():
        return Store.open(store).vocabulary_size
    return config.data.tokenizer.vocabulary_size
