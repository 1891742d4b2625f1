"""Weights & Biases: a copy of the metrics, the files that say what the run is, alerts, tables of samples.

Its failure (no key, no network, a full disk) never takes the run down: it is said once, and the run goes on; where the
server cannot be reached at the start, the attempt is kept offline and `wandb sync` sends it later. All waits have
limits: 40 seconds at the start, 30 at the end; no step waits.

One run keeps one id over its attempts (`wandb/id`), and its history has every step once. `metrics.jsonl` and
`events.jsonl` are what is handed over, each line once; how far that went, the server says (online) or
`wandb/handed.json` (offline). An attempt offline that did not end by itself (its file lacks what the library had not
yet written), or that was followed by one online, and that nobody has sent, is thrown away and its lines are handed over
again. A step that a restart or a rollback repeats is not drawn again: on the same layout a restart repeats its numbers.

Nothing but the configuration (which has no place for secrets), metrics, events, samples and the files named below is
handed over: no environment, no command line, no output.
"""

import json
import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import wandb

from launcher import config as configuration
from launcher.config import RunConfig, WandbConfig, WandbMode
from launcher.metrics import flat
from launcher.progress import Progress
from launcher.run_directory import TASK, RunDirectory
from parallel.common.files import write_text

_KEY_SECONDS, _START_SECONDS, _END_SECONDS = 10, 30, 30
_ROUTINE = ("started", "saved", "finished")
"""Events that nobody is woken for; every other one is an alert."""
_LEVELS = {"resumed": "INFO", "stopped": "INFO", "hung": "ERROR", "corrupted": "ERROR"}
"""Of alerts; others are warnings."""
_FILES = {"config": ("config.yaml",), "code": ("code.json",), "layout": ("history.jsonl",)}
"""Artifacts made of the run's own files: its configuration, the hashes of its code, layout and versions by attempt."""
_STORE_FILES = {"data": ("report.json", "manifest.jsonl"), "tokenizer": ("tokenizer.json",)}

logger = logging.getLogger(__name__)


class WeightsAndBiases:
    """One attempt's connection, or the silence after it failed."""

    def __init__(self, config: WandbConfig, *, run: Path, store: Path, name: str, shown: Mapping[str, Any]) -> None:
        self._directory = RunDirectory(run)
        self._store = store
        self._handed = _Handed(run / "wandb" / "handed.json")
        self._caught_up = False
        self._run: Any = None
        self._try("could not start", lambda: self._connect(config, name, shown))

    @classmethod
    def of(cls, config: RunConfig, run: Path) -> Self:
        """Of a run in its directory; connects."""
        shown, store = configuration.to_dict(config), Path(config.data.store)
        return cls(config.tracking.wandb, run=run, store=store, name=config.run.name, shown=shown)

    def log(self, progress: Progress, record: Mapping[str, Any]) -> None:
        """Hands one record over, unless its step was before; the first time also what earlier attempts could not."""
        if self._run is not None:
            records = [record] if self._caught_up else [*self._directory.metrics, record]
            self._try("stopped taking metrics", lambda: self._hand_over(records))

    def event(self, event: Mapping[str, Any], place: int) -> None:
        """Files of the run at an attempt's start; an alert for what is not routine, once; samples as a table; the
        latest figures of each task."""
        if self._run is not None and place > self._handed.events:
            self._try("stopped taking events", lambda: self._tell(event, place))

    def close(self, exit_code: int) -> None:
        """Writes what is left."""
        if self._run is not None:
            self._try("could not finish", lambda: self._run.finish(exit_code=exit_code))
            self._handed.ended()

    def _connect(self, config: WandbConfig, name: str, shown: Mapping[str, Any]) -> None:
        mode = config.mode
        wandb.setup(wandb.Settings(silent=True, x_graphql_timeout_seconds=5, x_graphql_retry_max=2))
        start = partial(_started, config.project, run=self._directory.path, name=name, shown=shown)
        try:
            if mode is WandbMode.online and wandb.Api(timeout=_KEY_SECONDS).api_key is None:
                raise PermissionError("there is no key: set WANDB_API_KEY, or call `wandb login`")
            self._run = start(mode)
        except Exception as error:
            if mode is not WandbMode.online:
                raise
            logger.warning(
                "Weights & Biases is out of reach (%s): this attempt is kept offline, `wandb sync` sends it later",
                _first_line(error),
            )
            let_go()
            mode = WandbMode.offline
            self._run = start(mode)
        if mode is WandbMode.online:
            self._handed.online(self._run.starting_step - 1)
        else:
            self._handed.offline(Path(self._run.dir).parent)

    def _hand_over(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._caught_up = True
        for record in records:
            if record["step"] > self._handed.step:
                given = {key.replace(".", "/"): value for key, value in flat(record).items() if value is not None}
                self._run.log(given, step=record["step"])
                self._handed.step = record["step"]
        self._handed.write()

    def _tell(self, event: Mapping[str, Any], place: int) -> None:
        name = str(event["event"])
        if name in ("started", "resumed"):
            self._keep(_FILES, self._directory.path)
            self._keep(_STORE_FILES, self._store)
        if name == "samples":
            if event["step"] >= self._handed.step:  # otherwise a restart repeats them
                rows: list[Any] = [[event["step"], row["prompt"], row["continuation"]] for row in event["rows"]]
                table = wandb.Table(columns=["step", "prompt", "continuation"], data=rows)
                self._run.log({"continuations": table}, step=event["step"])
        elif name == TASK:  # not in the history, whose steps only ascend: any checkpoint may be asked at any time
            figures = {"step": event["step"], **event["figures"]}
            self._run.summary.update({f"tasks/{event['task']}/{key}": value for key, value in figures.items()})
        elif name not in _ROUTINE:
            facts = {key: value for key, value in event.items() if key not in ("event", "time", "attempt")}
            said = ", ".join(f"{key} {value}" for key, value in facts.items())
            title = f"{self._run.name}: {event.get('kind', name)}"[:64]
            self._run.alert(title, said, level=_LEVELS.get(name, "WARN"), wait_duration=0)
        self._handed.events = place
        self._handed.write()

    def _keep(self, kinds: Mapping[str, Sequence[str]], directory: Path) -> None:
        """An artifact for each kind whose files are there; Weights & Biases sees by itself if nothing changed."""
        for kind, names in kinds.items():
            files = [directory / name for name in names if (directory / name).is_file()]
            if not files:
                continue
            policy = "immutable" if directory == self._store else "mutable"  # a run's own files grow; those are copied
            artifact = wandb.Artifact(f"{self._run.id}-{kind}", type=kind)
            for file in files:
                artifact.add_file(str(file), name=file.name, policy=policy)
            self._run.log_artifact(artifact)

    def _try(self, what: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._run = None
            logger.warning(
                "Weights & Biases %s (%s); the run goes on, metrics.jsonl has everything", what, _first_line(error)
            )


@dataclass(kw_only=True, slots=True)
class _Offline:
    """An attempt that was kept offline."""

    directory: str
    step: int
    """How far steps were handed over before it."""
    events: int
    """How far events were."""
    ended: bool = False
    """Whether its file is whole."""

    def superseded(self, online: bool) -> bool:
        """Whether its lines are to be handed over again: nobody has sent it, and it is not whole or out of order."""
        sent = any(Path(self.directory).glob("*.synced"))
        return not sent and (online or not self.ended)


@dataclass(slots=True)
class _Handed:
    """How far a run's records and events were handed over, over all of its attempts; written as it goes."""

    path: Path
    step: int = 0
    events: int = 0
    """Place in `events.jsonl`."""
    kept: list[_Offline] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.is_file():
            found = json.loads(self.path.read_text())
            self.step, self.events = found["step"], found["events"]
            self.kept = [_Offline(**each) for each in found["offline"]]

    def online(self, step: int) -> None:
        """The server has the steps up to `step`."""
        self._throw_away(online=True)
        self.step = max(step, 0)
        self.write()

    def offline(self, directory: Path) -> None:
        """This attempt is kept in a directory."""
        self._throw_away(online=False)
        self.kept.append(_Offline(directory=str(directory), step=self.step, events=self.events))
        self.write()

    def ended(self) -> None:
        """This attempt ended by itself."""
        for each in self.kept[-1:]:
            each.ended = True
        self.write()

    def write(self) -> None:
        """Whole or not at all; a power cut may forget the last, for the sake of every step's time."""
        offline = [asdict(each) for each in self.kept]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"step": self.step, "events": self.events, "offline": offline}))
        temporary.replace(self.path)

    def _throw_away(self, *, online: bool) -> None:
        for number, each in enumerate(self.kept):
            if each.superseded(online):
                for later in self.kept[number:]:  # what follows is out of order then
                    shutil.rmtree(later.directory, ignore_errors=True)
                self.step, self.events = each.step, each.events
                self.kept = self.kept[:number]
                break


def let_go() -> None:
    """Ends the library's process beside ours: as long as it tries to reach a server, it holds the run's id."""
    ending = threading.Thread(target=wandb.teardown, daemon=True)
    ending.start()
    ending.join(_KEY_SECONDS)  # it has no limit of its own


def _started(project: str, mode: WandbMode, *, run: Path, name: str, shown: Mapping[str, Any]) -> Any:
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,
        init_timeout=_START_SECONDS,
        finish_timeout=_END_SECONDS,
        x_graphql_timeout_seconds=5,
        x_graphql_retry_max=2,
    )
    return wandb.init(
        project=project,
        name=name,
        id=_identity(run),
        dir=run,
        mode=mode.value,
        resume="allow" if mode is WandbMode.online else None,
        config=dict(shown),
        settings=settings,
    )


def _identity(run: Path) -> str:
    file = run / "wandb" / "id"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        write_text(file, secrets.token_hex(4))
    return file.read_text().strip()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
