"""The whole configuration of a run: `RunConfig` composes what each room owns.

YAML files are merged left to right over the defaults, then `key=value` overrides, each of which sets its key whole; the
result is typed and frozen. An unknown key is answered with the nearest known one. Rules that span rooms are
`launcher.validate`'s.

A required key that nobody gave stays MISSING (`"???"`) in the loaded tree, because one file serves several verbs:
`data build` needs no model. Each verb asks for the sections that it reads with `require`.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipeline.config import DataConfig
from launcher import plugins
from launcher.anomaly.config import AnomalyConfig
from launcher.slurm.config import SlurmConfig
from launcher.watchdog.config import WatchdogConfig
from model.config import ModelConfig
from parallel.common.errors import ConfigError, Problem, UserError
from parallel.common.files import write_text
from parallel.config import CheckpointConfig, OptimizerConfig, ParallelConfig, Precision


class WandbMode(StrEnum):
    """Where Weights & Biases keeps the run."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSection:
    """What the run is called and where it lives."""

    name: str = MISSING
    """Letters, digits, `.`, `_` and `-`."""
    dir: str | None = None
    """Directory with everything of the run; by default `runs/{name}`."""
    seed: int = 1234
    """Every random stream (initial weights, order of samples) follows from it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RampConfig:
    """Steps at the beginning that take fewer samples; give `until_step` or `until_tokens`."""

    global_batch_size: int = MISSING
    """Samples in each of these steps, over all ranks."""
    until_step: int | None = None
    """The step, counted from 1, that is the last of this size."""
    until_tokens: str | None = None
    """Training tokens after which this size ends, `2B`; rounded up to whole steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How long and in what portions."""

    steps: int | None = None
    """Optimizer steps; give this or `tokens`."""
    tokens: str | None = None
    """Training tokens, `100B` or `5e9`; rounded up to whole steps."""
    global_batch_size: int = MISSING
    """Samples in one optimizer step, over all ranks."""
    batch_size_ramp: list[RampConfig] = field(default_factory=list)
    """Smaller steps at first, in this order; from the end of the last on, `global_batch_size`."""
    micro_batch_size: int = 1
    """Samples that one forward pass takes on one rank."""
    sequence_length: int = MISSING
    """Tokens in a sample."""
    objective: str | None = None
    """What is minimised: causal_lm, prefix_lm, masked_lm, masked_lm_next_sentence, span_corruption, or one that a
    plugin registers; by default what the model's family is made for."""
    z_loss: float = 0.0
    """Coefficient of the squared log-normaliser of each prediction, which keeps logits near 0 (PaLM has 1e-4)."""
    deterministic: bool = False
    """Let every operation and collective add up in one order, so that the same run has the same bits each time on an
    accelerator too; slower. What has no such form there ends the run with its name."""
    log_every_steps: int = 10
    """Steps between two lines of metrics."""
    profile_start_step: int | None = None
    """First step of a profile in `profile/` of the run (trace, dearest operations, memory); by default none."""
    profile_stop_step: int | None = None
    """Last step of the profile; by default the first one."""
    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TasksConfig:
    """Tasks that a run asks its model while it trains, as `bloomery evaluate` asks a checkpoint."""

    files: list[str] = field(default_factory=list)
    """YAML files that describe tasks, with their data beside them."""
    harness: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, by name (needs the extra `eval`)."""
    include: str | None = None
    """Directory with more task files of the harness."""
    few_shot: int | None = None
    """Examples before each question of the harness; by default what its task says."""
    limit: int | None = None
    """Of each task of the harness only the first so many questions."""
    every_steps: int | None = None
    """Steps between two times; by default `evaluate.every_steps`. After the last step they are asked too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is looked at inside the training loop."""

    every_steps: int | None = None
    """Steps between two evaluations; by default only `bloomery evaluate` looks at the validation documents."""
    batches: int = 8
    """Global batches of validation samples in one evaluation."""
    prompts: list[str] = field(default_factory=list)
    """Texts that the model continues at each evaluation, greedily, into `samples.jsonl` of the run."""
    sample_tokens: int = 32
    """Tokens of each continuation."""
    tasks: TasksConfig = field(default_factory=TasksConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Weights & Biases. The key comes from the environment, never from here."""

    mode: WandbMode = WandbMode.offline
    project: str = "bloomery"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides `metrics.jsonl`, and what they are held against."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    """Write event files to `tensorboard/` of the run too (needs the extra `tensorboard`)."""
    hardware: str | None = None
    """The machine whose peak MFU is a share of: a name under configs/hardware or a file such as theirs; by default the
    accelerator's own, by its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One tree, read by every verb."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision = Precision.auto
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    anomaly: AnomalyConfig = field(default_factory=AnomalyConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    plugins: list[str] = field(default_factory=list)
    """Modules that register families, optimizers, objectives, samples and filters of one's own (docs/plugins.md)."""


_DID_YOU_MEAN = re.compile(r"Did you mean(?: one of)?: (.+?)\?")


def load(files: Sequence[Path | str], overrides: Sequence[str] = ()) -> RunConfig:
    """Merges files left to right, then `key=value` overrides, into a typed, frozen tree.

    Raises:
        UserError: a file is missing or is not YAML, a key is unknown, a value has the wrong type; the sentence names
            the file (or the override) and the key. Or a module of `plugins` cannot be imported.
    """
    plain: Any = OmegaConf.create({})
    typed = _schema()
    for file in files:
        plain = OmegaConf.merge(plain, _read(Path(file)))
        typed = _typed(plain, str(file))
    if overrides:
        typed = _with_overrides(plain, overrides)
    try:
        values = OmegaConf.to_container(typed, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise UserError(f"{_sentence(error)}.") from error
    config = _instantiate(RunConfig, cast(dict[str, Any], values))
    plugins.load(config.plugins)
    return config


def require(config: RunConfig, *sections: str) -> None:
    """Refuses a tree in which a required key of these sections (`"data"`, `"train"`) stands open, all at once."""
    problems = missing(config, *sections)
    if problems:
        raise ConfigError(problems)


def missing(config: RunConfig, *sections: str) -> list[Problem]:
    """A problem for each required key of these sections that nobody gave."""
    return [
        Problem(key=key, got=None, legal="a value: this key is required")
        for key, value in flatten(to_dict(config)).items()
        if value == MISSING and key.split(".")[0] in sections
    ]


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The tree as plain JSON-able values: what `config.yaml`, manifests and the report show."""
    return _plain(asdict(config))


def save(config: RunConfig, path: Path) -> None:
    """Writes the whole tree, every default spelt out, as YAML that `load` reads back to an equal tree."""
    write_text(path, as_yaml(config))


def save_section(config: RunConfig, section: str, path: Path) -> None:
    """Writes one section, such as `model`, as YAML to stand before other files."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create({section: to_dict(config)[section]})))


def as_yaml(config: RunConfig) -> str:
    """The whole tree as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": [{"c": 1}]}}` as `{"a.b.0.c": 1}`; lists of plain values stay whole."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            flat.update(flatten({str(index): element for index, element in enumerate(value)}, f"{prefix}{key}."))
        elif isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def run_directory(config: RunConfig) -> Path:
    """Where everything of the run lives."""
    return Path(config.run.dir if config.run.dir is not None else f"runs/{config.run.name}")


def _read(file: Path) -> DictConfig:
    if not file.is_file():
        reason = "is a directory" if file.is_dir() else "does not exist"
        raise UserError(f"{file} {reason}: expected a YAML file, such as configs/quickstart.yaml, or key=value.")
    try:
        read = OmegaConf.load(file)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line} is not valid YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError, OmegaConfBaseException) as error:
        raise UserError(f"{file} cannot be read as YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(read, DictConfig):
        raise UserError(f"{file} holds no sections: expected keys such as `train:` and `model:` at its top level.")
    return read


def _with_overrides(plain: Any, overrides: Sequence[str]) -> DictConfig:
    """The typed tree after all overrides; checked at once, and one by one only to find which is wrong."""
    changed = plain
    for override in overrides:
        changed = _overridden(changed, override)
    try:
        return _typed(changed, "the overrides")
    except UserError:
        for override in overrides:
            plain = _overridden(plain, override)
            _typed(plain, f"the override {override}")
        raise


def _overridden(plain: Any, override: str) -> Any:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override} is not an override: expected key=value, such as train.steps=100.")
    changed = OmegaConf.create(OmegaConf.to_container(plain))
    try:
        read = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
        assert isinstance(read, dict)
        OmegaConf.update(cast(Any, changed), key, read["value"], merge=False)
    except yaml.YAMLError as error:
        raise UserError(f"the override {override} has a value that is not valid YAML.") from error
    except (OmegaConfBaseException, AssertionError, IndexError, ValueError) as error:
        raise UserError(f"the override {override} fits nothing in the configuration: {_sentence(error)}.") from error
    return changed


@cache
def _schema() -> Any:
    """The tree that omegaconf checks against, which it copies; making it takes 0.1 s."""
    return OmegaConf.structured(RunConfig)


def _typed(plain: Any, origin: str) -> DictConfig:
    try:
        typed = OmegaConf.merge(_schema(), plain)
    except OmegaConfBaseException as error:
        found = _DID_YOU_MEAN.search(str(error))
        if found or "not in" in str(error):
            hint = f"did you mean {found[1]}?" if found else "expected one that `bloomery train --print-config` shows."
            raise UserError(f"{origin}: the key {error.full_key} does not exist: {hint}") from error
        raise UserError(f"{origin}: {error.full_key or _culprit(plain)}: {_sentence(error)}.") from error
    assert isinstance(typed, DictConfig)
    return typed


def _instantiate(kind: Any, values: dict[str, Any]) -> Any:
    """The frozen dataclasses, from values that omegaconf has already checked; MISSING stays where it stands."""
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        return _instantiate(hint, value)
    if get_origin(hint) is list:
        return [_value(get_args(hint)[0], element) for element in value]
    return tuple(value) if get_origin(hint) is tuple else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return value.value if isinstance(value, StrEnum) else value


def _culprit(plain: Any) -> str:
    """The key whose value alone already fails: some of omegaconf's errors do not name theirs."""
    values = OmegaConf.to_container(plain)
    assert isinstance(values, dict)
    for key, value in flatten({str(name): value for name, value in values.items()}).items():
        alone = OmegaConf.create({})
        OmegaConf.update(alone, key, value)
        try:
            OmegaConf.merge(_schema(), alone)
        except OmegaConfBaseException:
            return key
    return "a value"


def _sentence(error: Exception) -> str:
    """omegaconf's first line, without the Python types that it is proud of."""
    text = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if "Merge error" in text:
        return "got a single value, expected keys below it"
    if text.startswith("TupleConfig length"):
        return "got a list of the wrong length"
    wanted = re.search(r"Value '(.*)' of type '\w+' could not be converted to (\w+)", text)
    if not wanted:
        return text
    kinds = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    return f"got {wanted[1]!r}, expected {kinds.get(wanted[2], wanted[2])}"
