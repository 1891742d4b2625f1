"""Where metrics go: `metrics.jsonl` always, Weights & Biases where asked for, the display.

`metrics.jsonl` is the truth; Weights & Biases is a copy, and its failure (no key, no network, a full disk) never takes
the run down: it is said once and the run goes on without it. A run keeps one Weights & Biases id over its restarts, in
`wandb/id`. Nothing but the configuration (which has no place for secrets) and the metrics is handed over: no
environment, no command line, no code.
"""

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from launcher.config import WandbConfig, WandbMode
from launcher.display import Display
from launcher.progress import Progress
from parallel.common.files import write_text
from parallel.common.lines import JsonLines

logger = logging.getLogger(__name__)


class Tracker:
    """Hands records on; on ranks other than 0 it has nowhere to."""

    def __init__(self, *, metrics: JsonLines | None, display: Display, remote: "WeightsAndBiases | None") -> None:
        self._metrics = metrics
        self._display = display
        self._remote = remote

    def log(self, progress: Progress, record: Mapping[str, Any]) -> None:
        """Records one step."""
        if self._metrics is not None:
            self._metrics.append(dict(record))
        self._display.log(record, remaining_tokens=progress.remaining_tokens)
        if self._remote is not None:
            self._remote.log(record)

    def close(self, exit_code: int) -> None:
        """The attempt is over."""
        if self._remote is not None:
            self._remote.close(exit_code)


class WeightsAndBiases:
    """One attempt's connection, or the silence after it failed."""

    def __init__(self, config: WandbConfig, *, run: Path, name: str, shown: Mapping[str, Any]) -> None:
        self._run: Any = None
        try:
            self._run = _connect(config, run=run, name=name, shown=shown)
        except Exception as error:
            self._gave_up("could not start", error)

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands one record over."""
        if self._run is None:
            return
        try:
            self._run.log({key: value for key, value in record.items() if value is not None}, step=record["step"])
        except Exception as error:
            self._gave_up("stopped taking metrics", error)

    def close(self, exit_code: int) -> None:
        """Writes what is left."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            self._gave_up("could not finish", error)

    def _gave_up(self, what: str, error: Exception) -> None:
        self._run = None
        logger.warning("Weights & Biases %s (%s); the run goes on, metrics.jsonl has everything", what, error)


def _connect(config: WandbConfig, *, run: Path, name: str, shown: Mapping[str, Any]) -> Any:
    mode = config.mode.value
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
    )
    if config.mode is WandbMode.online and wandb.Api(timeout=10).api_key is None:
        logger.warning(
            "Weights & Biases has no key (WANDB_API_KEY): the run is kept offline, `wandb sync` sends it later"
        )
        mode = WandbMode.offline.value
    return wandb.init(
        project=config.project,
        name=name,
        id=_identity(run),
        dir=run,
        mode=mode,
        resume="allow" if mode == WandbMode.online.value else None,
        config=dict(shown),
        settings=settings,
    )


def _identity(run: Path) -> str:
    file = run / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, secrets.token_hex(4))
    return file.read_text().strip()
