"""Waiting for a store that still grows (`bloomery data grow`), with a message and a limit.

The order of samples never depends on when a loader looks: a rank that is ahead waits by itself until what it needs is
sealed, and reads what every other rank reads there.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import DataConfig
from data_pipeline.manifest import Manifest
from data_pipeline.store import Store
from parallel.common.errors import UserError
from parallel.common.units import format_duration

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


def open_store(config: DataConfig) -> Store:
    """The store that training reads: a finished one, or one that grows and has sealed something (`data.follow`).

    Raises:
        UserError: it is missing, unfinished or damaged, or nothing was sealed within the limit.
    """
    path = Path(config.store)
    begun = time.monotonic()
    while config.follow and not _has_shards(path):
        if time.monotonic() - begun >= config.follow_seconds:
            raise UserError(
                f"{path} has sealed nothing for {format_duration(config.follow_seconds)} (data.follow_seconds): see "
                f"whether `bloomery data grow` runs"
            )
        if time.monotonic() - begun < _LOOK_SECONDS:
            logger.warning("waiting up to %s for the first shard of %s", format_duration(config.follow_seconds), path)
        time.sleep(_LOOK_SECONDS)
    return Store.open(path, follow=config.follow)


def _has_shards(path: Path) -> bool:
    manifest = Manifest.read(path)
    return manifest is not None and bool(manifest.shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class Following:
    """How long a loader waits for a store that still grows."""

    limit_seconds: float
    look_seconds: float = 1.0
    """Between two looks at the manifest."""


def wait_for_growth(store: Store, source: str, split: str, following: Following) -> Store:
    """The store as it is when a source has another shard, or when it has ended.

    Raises:
        UserError: neither happened within the limit.
    """
    had = len(store.shards(split=split, source=source))
    begun = time.monotonic()
    logger.warning(
        "training is ahead of the corpus: waiting up to %s for more of %s in %s",
        format_duration(following.limit_seconds),
        source,
        store.path,
    )
    while time.monotonic() - begun < following.limit_seconds:
        grown = Store.open(store.path, follow=True)
        if grown.ended or len(grown.shards(split=split, source=source)) > had:
            if grown.ended and not grown.shards(split=split, source=source):
                raise UserError(f"the store {store.path} has ended without any {split} documents of {source}")
            logger.warning("the corpus has grown: going on after %s", format_duration(time.monotonic() - begun))
            return grown
        time.sleep(following.look_seconds)
    raise UserError(
        f"{store.path} has sealed nothing more of {source} for {format_duration(following.limit_seconds)} "
        f"(data.follow_seconds): see whether `bloomery data grow` still runs, then start this command again"
    )
