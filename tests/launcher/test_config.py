"""The configuration tree: typed, merged left to right, and every mistake answered in one sentence."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import config as configuration
from launcher.config import RunConfig, load
from launcher.length import total_steps
from model.size import parameter_count
from parallel.common.errors import ConfigError, UserError

CONFIGS = sorted(
    path
    for path in (Path(__file__).resolve().parent.parent.parent / "configs").rglob("*.yaml")
    if path.parent.name != "hardware"  # what `bloomery plan` reads
)


def written(directory: Path, text: str, name: str = "a.yaml") -> Path:
    """A file with this text."""
    path = directory / name
    path.write_text(text)
    return path


def test_files_merge_left_to_right_and_overrides_win(tmp_path: Path) -> None:
    first = written(tmp_path, "train: {steps: 1, global_batch_size: 8}\nmodel: {layers: 2}")
    second = written(tmp_path, "train: {steps: 2}", "b.yaml")
    config = load([first, second], ["model.layers=3"])
    assert (config.train.steps, config.train.global_batch_size, config.model.layers) == (2, 8, 3)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_a_number_is_a_number(text: str, tmp_path: Path) -> None:
    assert load([], [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 1e-4
    assert load([written(tmp_path, f"optimizer: {{learning_rate: {text}}}")]).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(("text", "steps"), [("100B", 24414063), ("5e9", 1220704), ("4097", 2), ("4096", 1)])
def test_tokens_are_rounded_up_to_whole_steps(text: str, steps: int) -> None:
    config = load([], [f"train.tokens={text}", "train.global_batch_size=8", "train.sequence_length=512"])
    assert total_steps(config) == steps


def test_lists_are_reached_by_index_and_a_value_is_set_whole(tmp_path: Path) -> None:
    file = written(tmp_path, "data: {sources: [{name: a, path: x}, {name: b, path: y}], mixture: {a: 1, b: 2}}")
    config = load([file], ["data.sources.1.path=[p, q]", "data.mixture={b: 3}", "parallel.sequence_parallel=true"])
    assert config.data.sources[1].path == ["p", "q"]
    assert config.data.mixture == {"b": 3.0}
    assert config.parallel.sequence_parallel is True


def test_what_is_saved_loads_to_the_same_tree(tmp_path: Path) -> None:
    text = "run: {name: x, dir: 'r/${run.name}'}\ndata: {sources: [{name: a, path: [b, c], include: ['*.py']}]}"
    config = load([written(tmp_path, text)], ["precision=bf16", "optimizer.eps=1e-9"])
    assert config.run.dir == "r/x"
    configuration.save(config, tmp_path / "saved.yaml")
    assert load([tmp_path / "saved.yaml"]) == config


@settings(max_examples=25, deadline=None)
@given(st.floats(min_value=1e-12, max_value=1e6), st.integers(min_value=1, max_value=10**9))
def test_numbers_survive_being_saved(rate: float, steps: int) -> None:
    config = load([], [f"optimizer.learning_rate={rate!r}", f"train.steps={steps}"])
    assert (config.optimizer.learning_rate, config.train.steps) == (rate, steps)


def test_a_required_key_may_stand_open_until_a_verb_needs_it() -> None:
    config = load([], ["data.store=s"])
    configuration.require(config, "data")
    with pytest.raises(ConfigError) as caught:
        configuration.require(config, "run", "train")
    keys = {problem.key for problem in caught.value.problems}
    assert keys == {"run.name", "train.global_batch_size", "train.sequence_length"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {stepz: 1}", "train.stepz does not exist: did you mean 'steps'?"),
        ("trian: {steps: 1}", "trian does not exist: did you mean 'train'"),
        ("data: {sources: [{nam: a}]}", "did you mean 'name'?"),
        ("train: {steps: many}", "train.steps: got 'many', expected a whole number"),
        ("train: {steps: 1.5}", "train.steps: got '1.5', expected a whole number"),
        ("optimizer: {betas: [1, 2, 3]}", "optimizer.betas: got a list of the wrong length"),
        ("precision: fp99", "precision: Invalid value 'fp99', expected one of [auto, bf16, fp32, fp16, fp8]"),
        ("train: 3", "train: got a single value, expected keys below it"),
        ("train: {steps: 1", "is not valid YAML"),
        ("train:\n\tsteps: 1", "line 2 is not valid YAML"),
        ("train: {steps: 1}\ntrain: {steps: 2}", "found duplicate key train"),
        ("- 1", "holds no sections"),
        ("3", "cannot be read as YAML"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_that_names_file_and_key(tmp_path: Path, text: str, told: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load([file])
    assert told in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_undecodable_and_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for name, told in (("binary.yaml", "cannot be read"), ("none.yaml", "does not exist"), (".", "is a directory")):
        with pytest.raises(UserError, match=told) as caught:
            load([tmp_path / name])
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.steps", "is not an override: expected key=value"),
        ("=3", "is not an override"),
        ("train.stepz=3", "did you mean 'steps'?"),
        ("train.steps=x", "expected a whole number"),
        ("train.steps=[", "not valid YAML"),
        ("data.sources.3.path=x", "fits nothing in the configuration"),
        ("data.mixture=3", "data.mixture"),
        ("train.global_batch_size=${nothing}", "'nothing' not found"),
    ],
)
def test_a_mistake_in_an_override_is_one_sentence(override: str, told: str) -> None:
    with pytest.raises(UserError, match=r".") as caught:
        load([], ["data.sources=[{name: a, path: b}]", override])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_of_the_repository_loads(path: Path) -> None:
    assert isinstance(load([path]), RunConfig)


@pytest.mark.truth
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("1b", 1_235_814_400),
        ("3b", 3_212_749_824),
        ("8b", 8_030_261_248),
        ("70b", 70_553_706_496),
        ("405b", 405_853_388_800),
    ],
)
def test_the_named_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    (path,) = [path for path in CONFIGS if path.stem == f"llama-{name}"]
    assert parameter_count(load([path]).model, 128_256) == parameters
