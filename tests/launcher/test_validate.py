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
        (("parallel.pipeline=2", "parallel.pipeline_split=[3, 5]"), 2),
        (("parallel.context=2", "parallel.tensor=2"), 8),
        (("model.moe.experts=4", "parallel.expert=4", "parallel.context=2", "parallel.zero_stage=2"), 8),
        (("model.moe.experts=4", "parallel.tensor=2", "parallel.expert=2", "model.moe.first_layer=7"), 4),
        (("parallel.recompute={mode: full, blocks: 4}", "parallel.pipeline=2"), 2),
        (("parallel.offload=true", "parallel.zero_stage=3"), 2),
        (("precision=fp16",), 1),
        (("model.position=learned", "model.head_size=7", "model.positions=32"), 1),
        (("optimizer.name=muon", "parallel.tensor=2", "parallel.zero_stage=0"), 4),
        (("optimizer={groups: [{pattern: norm, weight_decay: 0.1}], frozen: [embedding], name: adafactor}",), 1),
    ],
)
def test_sound_configurations_pass(overrides: tuple[str, ...], ranks: int) -> None:
    check_training(config(*overrides), ranks=ranks)


@pytest.mark.parametrize(
    ("overrides", "ranks", "key", "legal"),
    [
        (("model.hidden_size=60",), 1, "model.hidden_size", "a multiple of model.heads = 8, such as 56"),
        (
            ("model.pattern=WMW", "model.sliding_window=8"),
            1,
            "model.pattern",
            "layers of Mamba need",
        ),
        (
            ("model.pattern=WXF", "model.sliding_window=8"),
            1,
            "model.pattern",
            "letters W (within model.sliding_window)",
        ),
        (("model.pattern=WF",), 1, "model.pattern", "null without model.sliding_window"),
        (("model.family=lama",), 1, "model.family", "llama, if that was meant"),
        (("optimizer.name=moun",), 1, "optimizer.name", "muon, if that was meant"),
        (
            ("optimizer.name=shampoo",),
            1,
            "optimizer.name",
            "adamw, adamw_8bit, muon, adafactor, or one that a plugin registers",
        ),
        (("optimizer.frozen=['layers.(']",), 1, "optimizer.frozen", "a regular expression: missing )"),
        (("optimizer.options={rho: 1}",), 1, "optimizer.options", "empty with optimizer.name=adamw"),
        (("optimizer.muon.momentum=1",), 1, "optimizer.muon.momentum", "from 0 to below 1"),
        (("optimizer.name=muon", "parallel.zero_stage=2"), 2, "parallel.zero_stage", "0 or 1 with optimizer.name=muon"),
        (("optimizer.name=muon", "parallel.offload=true"), 2, "parallel.offload", "false with optimizer.name=muon"),
        (("model.head_size=7",), 1, "model.head_size", "an even number"),
        (("model.kv_heads=3",), 1, "model.kv_heads", "a divisor of model.heads = 8, such as 2"),
        (("model.vocabulary_size=1000",), 1, "model.vocabulary_size", "a multiple of 128, such as 1024"),
        (("parallel.tensor=3",), 3, "parallel.tensor", "a divisor of model."),
        (("parallel.tensor=8",), 8, "parallel.tensor", "a divisor of model.kv_heads = 4, such as 4"),
        (("parallel.tensor=2",), 3, "parallel.tensor", "tensor x pipeline x context = 2 to divide the 3 ranks"),
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
        (
            ("parallel.tensor=2", "train.sequence_length=33"),
            2,
            "train.sequence_length",
            "a multiple of 2 (parallel.tensor with sequence parallelism), such as 32",
        ),
        (
            ("parallel.context=2", "train.sequence_length=34"),
            2,
            "train.sequence_length",
            "a multiple of 4 (2 x parallel.context), such as 32",
        ),
        (
            ("parallel.context=2", "parallel.tensor=4", "train.sequence_length=36"),
            8,
            "train.sequence_length",
            "a multiple of 8 (2 x parallel.context, and parallel.tensor with sequence parallelism), such as 32",
        ),
        (("parallel.context=4",), 6, "parallel.context", "tensor x pipeline x context = 4 to divide the 6 ranks"),
        (("parallel.context=0",), 1, "parallel.context", "a number above 0"),
        (("parallel.expert=2",), 2, "parallel.expert", "1 without model.moe.experts"),
        (("model.moe.experts=6", "parallel.expert=3"), 4, "parallel.expert", "data x context = 4, such as 2"),
        (("model.moe.experts=6", "parallel.expert=4"), 4, "parallel.expert", "model.moe.experts = 6, such as 3"),
        (
            ("model.moe.experts=2", "model.moe.top_k=1"),
            1,
            "model.moe.normalise_top_k",
            "false with model.moe.top_k = 1",
        ),
        (("model.moe.experts=2", "model.moe.top_k=3"), 1, "model.moe.top_k", "at most model.moe.experts = 2"),
        (("model.moe.experts=2", "model.moe.first_layer=8"), 1, "model.moe.first_layer", "below model.layers = 8"),
        (
            ("model.moe.experts=2", "model.moe.ffn_hidden_size=33", "parallel.tensor=2"),
            2,
            "parallel.tensor",
            "a divisor of model.moe.ffn_hidden_size = 33, such as 1",
        ),
        (
            ("model.moe.experts=2", "parallel.tensor=2", "parallel.sequence_parallel=false"),
            2,
            "parallel.sequence_parallel",
            "auto or true with experts and tensor > 1",
        ),
        (("model.moe.experts=2", "model.linear_bias=true"), 1, "model.linear_bias", "false with experts"),
        (
            ("model.moe.experts=2", "parallel.zero_stage=3"),
            2,
            "parallel.zero_stage",
            "at most 2 with model.moe.experts",
        ),
        (("model.moe.z_loss=-1",), 1, "model.moe.z_loss", "0 or more"),
        (("parallel.offload=true", "parallel.zero_stage=0"), 1, "parallel.offload", "or parallel.zero_stage 1"),
        (("parallel.pipeline=3", "parallel.pipeline_split=[4, 4]"), 3, "parallel.pipeline_split", "such as [3, 3, 2]"),
        (("parallel.pipeline=2", "parallel.pipeline_split=[4, 5]"), 2, "parallel.pipeline_split", "such as [4, 4]"),
        (("parallel.pipeline=2", "parallel.pipeline_split=[-1, 9]"), 2, "parallel.pipeline_split", "such as [4, 4]"),
        (("parallel.recompute.blocks=2",), 1, "parallel.recompute.blocks", "null with recompute.mode=none"),
        (
            ("parallel.recompute={mode: full, blocks: 5}", "parallel.pipeline=2"),
            2,
            "parallel.recompute.blocks",
            "at most 4, which a pipeline chunk holds",
        ),
        (("model.dropout=1",), 1, "model.dropout", "a share from 0 to below 1"),
        (("model.position=learned", "model.positions=16"), 1, "train.sequence_length", "at most model.positions = 16"),
        (("model.latent.kv_rank=64",), 1, "model.head_size", "above model.latent.rope_head_size = 64"),
        (("model.latent.kv_rank=64", "model.kv_heads=2"), 1, "model.kv_heads", "every head has keys and values"),
        (("model.latent.kv_rank=64", "model.qk_norm=true"), 1, "model.qk_norm", "false with model.latent"),
        (("model.moe={experts: 8, groups: 3}",), 1, "model.moe.groups", "a divisor of model.moe.experts = 8"),
        (("model.moe={experts: 8, groups: 4, top_k: 3}",), 1, "model.moe.top_groups", "enough for model.moe.top_k"),
        (
            ("model.moe={experts: 8, groups: 8, group_experts: 2, top_groups: 2}",),
            1,
            "model.moe.group_experts",
            "1 exp",
        ),
        (("model.moe={experts: 8, groups: 2, top_groups: 3}",), 1, "model.moe.top_groups", "at most model.moe.groups"),
        (("model.rope_share=0.1",), 1, "model.rope_share", "leaves an even number of a head's"),
        (("model.rope_share=1.5",), 1, "model.rope_share", "at most 1"),
        (("model.rope_local_base=100.0",), 1, "model.rope_local_base", "null without model.sliding_window"),
        (
            ("model.rope_scaling={kind: yarn, factor: 2.0, beta_fast: 1.0}",),
            1,
            "model.rope_scaling.beta_fast",
            "more than model.rope_scaling.beta_slow = 1.0",
        ),
        (("model.rope_scaling.factor=0.5",), 1, "model.rope_scaling.factor", "1 or more"),
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
