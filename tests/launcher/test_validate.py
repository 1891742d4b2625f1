"""Every rule that spans rooms: alone it is named with what would be legal, together all are reported at once."""

from pathlib import Path

import pytest

from data_pipeline.store import Store
from launcher.config import RunConfig, load
from launcher.validate import check_training
from parallel.common.errors import ConfigError

GOOD = (
    "run.name=good", "model.layers=8", "model.hidden_size=64", "model.heads=8", "model.kv_heads=4",
    "model.ffn_hidden_size=96", "train.steps=100", "train.global_batch_size=16", "train.micro_batch_size=2",
    "train.sequence_length=32", "data.store=s",
)  # fmt: skip


def config(*overrides: str) -> RunConfig:
    """A sound configuration with changes."""
    return load([], [*GOOD, *overrides])


def problems(*overrides: str, ranks: int = 1, store: Store | None = None) -> dict[str, str]:
    """{key: text} of everything that is wrong."""
    with pytest.raises(ConfigError) as caught:
        check_training(config(*overrides), ranks=ranks, store=store)
    return {problem.key: str(problem) for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        ((), 1),
        ((), 8),
        (("parallel.tensor=2", "parallel.pipeline=2"), 8),
        (("parallel.pipeline=2", "parallel.virtual_pipeline=2"), 2),
        (("parallel.pipeline=2", "parallel.zero_stage=2"), 4),
        (("parallel.zero_stage=3",), 2),
        (("train.steps=null", "train.tokens=100K"), 1),
        (("train.global_batch_size=15",), 4),
    ],
)
def test_sound_configurations_pass(overrides: tuple[str, ...], ranks: int) -> None:
    check_training(config(*overrides), ranks=ranks)


@pytest.mark.parametrize(
    ("overrides", "ranks", "key", "legal"),
    [
        (("model.hidden_size=60",), 1, "model.hidden_size", "a multiple of model.heads = 8, such as 56"),
        (("model.head_size=7",), 1, "model.head_size", "an even number"),
        (("model.kv_heads=3",), 1, "model.kv_heads", "a divisor of model.heads = 8, such as 2"),
        (("model.vocabulary_size=1000",), 1, "model.vocabulary_size", "a multiple of 128, such as 1024"),
        (("parallel.tensor=3",), 3, "parallel.tensor", "a divisor of model."),
        (("parallel.tensor=8",), 8, "parallel.tensor", "a divisor of model.kv_heads = 4, such as 4"),
        (("parallel.tensor=2",), 3, "parallel.tensor", "tensor x pipeline = 2 to divide the 3 ranks"),
        (("parallel.pipeline=3",), 3, "model.layers", "such as 9"),
        (("parallel.pipeline=2", "parallel.virtual_pipeline=3"), 2, "model.layers", "virtual_pipeline = 6, such as 6"),
        (("parallel.virtual_pipeline=2",), 1, "parallel.virtual_pipeline", "1 where pipeline is 1"),
        (("parallel.pipeline=2", "parallel.zero_stage=3"), 2, "parallel.zero_stage", "at most 2 with a pipeline"),
        (
            ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.zero_stage=2"),
            2,
            "parallel.zero_stage",
            "1 with virtual_pipeline > 1",
        ),
        (("parallel.zero_stage=4",), 1, "parallel.zero_stage", "0, 1, 2 or 3"),
        (("parallel.sequence_parallel=true",), 1, "parallel.sequence_parallel", "auto or false where tensor is 1"),
        (("parallel.tensor=2", "train.sequence_length=33"), 2, "train.sequence_length", "such as 32"),
        (
            ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.global_batch_size=10"),
            2,
            "train.global_batch_size",
            "a multiple of 4, such as 8",
        ),
        (
            ("train.global_batch_size=3",),
            4,
            "train.global_batch_size",
            "at least micro_batch_size x data-parallel ranks",
        ),
        (("train.tokens=5B",), 1, "train.steps", "exactly one of train.steps and train.tokens"),
        (("train.steps=null",), 1, "train.steps", "exactly one of"),
        (("train.steps=null", "train.tokens=many"), 1, "train.tokens", "a number such as 5000, 1.5M or 100B"),
        (("optimizer.schedule.warmup_steps=100",), 1, "optimizer.schedule.warmup_steps", "fewer than the 100 steps"),
        (
            ("optimizer.schedule.name=wsd", "optimizer.schedule.warmup_steps=50", "optimizer.schedule.decay_steps=60"),
            1,
            "optimizer.schedule.decay_steps",
            "at most 50",
        ),
        (("optimizer.schedule.min_learning_rate=1",), 1, "optimizer.schedule.min_learning_rate", "at most optimizer."),
        (("run.name=../evil",), 1, "run.name", "such as evil"),
        (("run.name='a b\n'",), 1, "run.name", "such as a-b"),
        (("run.name=.hidden",), 1, "run.name", "not beginning with a dot"),
        (("optimizer.learning_rate=0",), 1, "optimizer.learning_rate", "a number above 0"),
        (("optimizer.learning_rate=.nan",), 1, "optimizer.learning_rate", "a number above 0"),
        (("optimizer.weight_decay=-1",), 1, "optimizer.weight_decay", "0 or more"),
        (("optimizer.betas=[0.9, 1.0]",), 1, "optimizer.betas", "below 1"),
        (("train.micro_batch_size=0",), 1, "train.micro_batch_size", "a number above 0"),
        (("data.mixture={a: -1}",), 1, "data.mixture.a", "a share of 0 or more"),
    ],
)
def test_a_rule_names_the_key_and_what_is_legal(overrides: tuple[str, ...], ranks: int, key: str, legal: str) -> None:
    found = problems(*overrides, ranks=ranks)
    assert legal in found[key]
    assert all("\n" not in text for text in found.values())


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        "run.name=a b", "model.kv_heads=3", "train.tokens=5B", "parallel.zero_stage=3", "parallel.pipeline=3"
    )
    assert set(found) == {
        "run.name", "model.kv_heads", "train.steps", "parallel.zero_stage", "model.layers", "parallel.pipeline",
    }  # fmt: skip


def test_open_keys_are_reported_before_anything_is_computed_with_them() -> None:
    with pytest.raises(ConfigError) as caught:
        check_training(load([], ["model.layers=2"]), ranks=1)
    assert {"run.name", "model.heads", "train.sequence_length", "data.store"} <= {
        problem.key for problem in caught.value.problems
    }


def test_the_store_has_its_say(store: Path) -> None:
    opened = Store.open(store)
    found = problems("model.vocabulary_size=1024", "data.mixture={code: 1, poems: 1}", store=opened)
    assert f"the store's {opened.vocabulary_size}" in found["model.vocabulary_size"]
    assert "a source of the store: code, prose" in found["data.mixture.poems"]
    check_training(config("evaluate.every_steps=5"), ranks=1, store=opened)
    assert "at least one share above 0" in problems("data.mixture={code: 0}", store=opened)["data.mixture"]
