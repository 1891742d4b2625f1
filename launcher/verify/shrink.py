"""A user's configuration made small enough for this machine: the same family, features and dimensions, tiny sizes.

What is kept is what a layout can get wrong: every dimension above 1, whether heads are grouped, whether stages are
uneven, how experts are chosen, what is tied, biased, normed, dropped out and recomputed. What goes is size. A layout of
up to `MOST_RANKS` ranks keeps its degrees, but for data parallelism, which becomes 2. A larger one keeps every
dimension at a smaller degree, and is proven again by each pair of its dimensions at larger ones.

Contract: the shrunk configuration passes every rule of launcher.validate that the user's own passed. Whatever differs
is listed, key by key, and what could not be kept is listed apart. Imports without torch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from omegaconf import MISSING

from data_pipeline.config import DataConfig
from launcher.config import RunConfig, RunSection, TrainConfig, flatten, require, to_dict
from launcher.length import total_steps
from launcher.validate import check_training
from model.config import LatentConfig, LoraConfig, ModelConfig, MoeConfig, MupConfig
from parallel.config import CheckpointConfig, OptimizerConfig, ParallelConfig, ScheduleConfig, ScheduleName

MOST_RANKS = 16
"""Ranks of a proof of all dimensions at most."""
_PAIR_RANKS = 8
"""Ranks of a proof of two dimensions at most."""
STEPS = 3
"""Steps that a proof takes."""

_DIMENSIONS = ("tensor", "pipeline", "context", "data")
_VOCABULARY_UNIT = 128
_LEARNING_RATE, _CLIP_NORM, _INITIAL_STD = 1e-2, 0.1, 0.1
"""Large steps, always clipped, from weights that have a say in so narrow a model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A value that is another one in the small configuration."""

    key: str
    was: object
    now: object


@dataclass(frozen=True, kw_only=True, slots=True)
class Shrunk:
    """One layout to prove."""

    name: str
    """Its dimensions in words: `tensor 2 x data 2`."""
    config: RunConfig
    ranks: int
    changes: tuple[Change, ...]
    dropped: tuple[str, ...]
    """What the small layout does not have any more, a phrase each."""


def complete(config: RunConfig, ranks: int | None) -> tuple[RunConfig, int]:
    """The configuration with everything that a layout needs and the user left open, and the number of ranks.

    Without `ranks` it is the smallest with two data-parallel ranks (more where experts need them). Sections that say
    nothing of a layout (run, data, checkpoint, evaluate, tracking) become defaults.

    Raises:
        ConfigError: the model is not described, or `bloomery train` could not run it on so many ranks; all problems.
    """
    require(config, "model")
    layout, train = config.parallel, config.train
    model_ranks = max(1, layout.tensor * layout.pipeline * layout.context)
    if ranks is None:
        data = 2
        while data < layout.expert and data * layout.context % layout.expert:
            data += 1
        ranks = model_ranks * data
    micro_batches = 2 * max(1, layout.pipeline)
    unit = math.lcm(max(1, layout.tensor), 2 * max(1, layout.context))
    filled = replace(
        train,
        sequence_length=64 * unit if train.sequence_length == MISSING else train.sequence_length,
        global_batch_size=train.micro_batch_size * micro_batches * max(1, ranks // model_ranks)
        if train.global_batch_size == MISSING
        else train.global_batch_size,
        steps=config.optimizer.schedule.warmup_steps + 1000
        if train.steps is None and train.tokens is None
        else train.steps,
    )
    completed = RunConfig(
        run=RunSection(name="verify", seed=config.run.seed),
        model=config.model,
        train=filled,
        parallel=layout,
        precision=config.precision,
        optimizer=config.optimizer,
        data=DataConfig(store="none"),
        checkpoint=CheckpointConfig(),
    )
    check_training(completed, ranks=ranks)
    return completed, ranks


def shrink(config: RunConfig, ranks: int) -> list[Shrunk]:
    """The layouts that prove a complete configuration: its own, and where that was reduced, pairs of its dimensions.

    The first has all dimensions. The others, each with two of them, have larger degrees than it.
    """
    degrees = _degrees(config, ranks)
    expert = config.parallel.expert
    own, own_expert, dropped = _fit(degrees, expert, MOST_RANKS)
    proofs = [_small(config, own, own_expert, ranks=ranks, dropped=dropped)]
    if math.prod(own[name] for name in _DIMENSIONS[:-1]) == math.prod(degrees[name] for name in _DIMENSIONS[:-1]):
        return proofs
    kept = [name for name in _DIMENSIONS if degrees[name] > 1]
    for pair in combinations(kept, 2):
        wanted = {name: degree if name in pair else 1 for name, degree in degrees.items()}
        fits, pair_expert, _ = _fit(wanted, expert if {"data", "context"} & set(pair) else 1, _PAIR_RANKS)
        if any(fits[name] > own[name] for name in pair):
            proofs.append(_small(config, fits, pair_expert, ranks=ranks, dropped=()))
    return proofs


def _degrees(config: RunConfig, ranks: int) -> dict[str, int]:
    layout = config.parallel
    model_ranks = layout.tensor * layout.pipeline * layout.context
    return {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "data": ranks // model_ranks,
    }


def _fit(degrees: dict[str, int], expert: int, most: int) -> tuple[dict[str, int], int, tuple[str, ...]]:
    """Degrees whose product is at most `most`, none above 1 becoming 1; the expert degree; what was lost."""
    replicated = degrees["data"] * degrees["context"] > expert > 1
    fits = dict(degrees)
    while True:
        for degree in (number for number in range(expert, 0, -1) if number > 1 or expert == 1):
            for replicas in (True, False) if replicated else (False,):
                data = _data_ranks(degrees["data"], fits["context"], degree, replicas=replicas)
                if fits["tensor"] * fits["pipeline"] * fits["context"] * data <= most:
                    lost = ("data-parallel copies of experts",) if replicated and not replicas else ()
                    return {**fits, "data": data}, degree, lost
        largest = max(_DIMENSIONS[:-1], key=lambda name: (fits[name], name == "tensor", name == "context"))
        fits[largest] = max((part for part in range(2, fits[largest]) if fits[largest] % part == 0), default=2)


def _data_ranks(given: int, context: int, expert: int, *, replicas: bool) -> int:
    """The fewest data-parallel ranks that can share `expert` ways of holding experts, twice with `replicas`."""
    data = min(given, 2)
    while (data * context) % expert or (replicas and data * context // expert < 2):
        data += 1
    return data


def _small(config: RunConfig, degrees: dict[str, int], expert: int, *, ranks: int, dropped: Sequence[str]) -> Shrunk:
    layout = _layout(config, degrees, expert)
    train = _train(config.train, layout, degrees["data"])
    sized = _sized(config.model, layout, _layers(config, layout))
    small = RunConfig(
        run=config.run,
        model=replace(sized, **_reach(config, train.sequence_length)),
        train=train,
        parallel=layout,
        precision=config.precision,
        optimizer=_optimizer(config.optimizer),
        data=config.data,
    )
    small_ranks = math.prod(degrees.values())
    check_training(small, ranks=small_ranks)
    return Shrunk(
        name=" x ".join(_words(small, degrees)) or "one rank",
        config=small,
        ranks=small_ranks,
        changes=(*_ranks_changed(config, ranks, degrees), *_changes(config, small)),
        dropped=tuple(dropped),
    )


def _words(config: RunConfig, degrees: dict[str, int]) -> Iterator[str]:
    layout = config.parallel
    for name in _DIMENSIONS:
        if degrees[name] > 1:
            yield f"{name} {degrees[name]}"
        if name == "pipeline" and layout.virtual_pipeline > 1:
            yield f"virtual pipeline {layout.virtual_pipeline}"
    if layout.expert > 1:
        yield f"expert {layout.expert}"


def _layout(config: RunConfig, degrees: dict[str, int], expert: int) -> ParallelConfig:
    layout = config.parallel
    chunks = min(layout.virtual_pipeline, 2) if degrees["pipeline"] > 1 else 1
    split = _split(layout.pipeline_split, degrees["pipeline"] * chunks)
    recompute = layout.recompute
    if recompute.blocks is not None:
        recompute = replace(recompute, blocks=1)
    alone = layout.sequence_parallel is True and degrees["tensor"] == 1
    return replace(
        layout,
        tensor=degrees["tensor"],
        pipeline=degrees["pipeline"],
        virtual_pipeline=chunks,
        pipeline_split=split,
        context=degrees["context"],
        expert=expert,
        sequence_parallel="auto" if alone else layout.sequence_parallel,
        recompute=recompute,
    )


def _split(split: Sequence[int] | None, chunks: int) -> list[int] | None:
    """An uneven split in proportion, with as few layers as can be: 3, 5, 5, 3 becomes 1, 2, 2, 1."""
    if split is None or chunks == 1:
        return None
    places = [round(index * (len(split) - 1) / (chunks - 1)) for index in range(chunks)]
    chosen = [split[place] for place in places]
    if len(set(chosen)) == 1 and len(set(split)) > 1:
        chosen[-1] += 1
    sizes = sorted(set(chosen) - {0})
    return [sizes.index(layers) + 1 if layers else 0 for layers in chosen]


def _layers(config: RunConfig, layout: ParallelConfig) -> int:
    """Depth: what the pipeline needs, twice that where a chunk's layers differ from each other, and at least 2."""
    if layout.pipeline_split is not None:
        return sum(layout.pipeline_split)
    chunks = layout.pipeline * layout.virtual_pipeline
    blocks = config.parallel.recompute.blocks
    per_chunk = config.model.layers // (config.parallel.pipeline * config.parallel.virtual_pipeline)
    partly = blocks is not None and blocks < per_chunk
    return max(2, chunks * (2 if partly else 1))


def _sized(model: ModelConfig, layout: ParallelConfig, layers: int) -> ModelConfig:
    tensor = layout.tensor
    kv_heads, heads = _heads(model, tensor)
    head_size = 8 if heads >= 4 else 16
    hidden = heads * head_size
    own_size = model.head_size is not None and model.head_size * model.heads != model.hidden_size
    if model.latent.kv_rank is not None:
        head_size, own_size = 12, True
    elif own_size:
        hidden = hidden * 2 if model.head_size * model.heads < model.hidden_size else hidden // 2  # type: ignore[operator]
    deviation = _INITIAL_STD * _calming(model, head_size)
    return replace(
        model,
        layers=layers,
        decoder_layers=None if model.decoder_layers is None else 3,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size if own_size else None,
        ffn_hidden_size=max(48, 24 * tensor),
        vocabulary_size=2 * math.lcm(_VOCABULARY_UNIT, tensor),
        initial_std=deviation,
        latent=_latent(model.latent),
        mup=MupConfig(
            base_hidden_size=None if model.mup.base_hidden_size is None else hidden // 2,
            base_head_size=None if model.mup.base_head_size is None else head_size // 2,
        ),
        moe=_moe(model.moe, layout, layers),
        lora=_lora(model.lora, deviation),
    )


def _calming(model: ModelConfig, head_size: int) -> float:
    """By what weights are smaller where attention scores are divided by less than usual (T5: by nothing): so the scores
    are no larger, and a softmax that has long decided does not turn roundings into errors."""
    divisor = model.query_pre_attention_scalar
    return 1.0 if divisor is None else min(1.0, (divisor / head_size) ** 0.25)


def _reach(config: RunConfig, sequence: int) -> dict[str, Any]:
    """What counts tokens or channels: a window stays shorter than a row, a row reaches past what was stretched."""
    model, given = config.model, config.train.sequence_length
    reach: dict[str, Any] = {
        "rope_scaling": replace(model.rope_scaling, original_positions=sequence // 2)
        if model.rope_scaling.factor > 1
        else model.rope_scaling
    }
    if model.rope_share < 1:
        reach["rope_share"] = 0.5  # of the small heads an even number of channels, some of which stay
    if model.positions is not None:
        reach["positions"] = sequence * (2 if model.positions > given else 1)
    if model.sliding_window is not None:
        reach["sliding_window"] = sequence // 3 if model.sliding_window < given else sequence
    if model.pattern is not None:
        reach["pattern"] = "".join(dict.fromkeys(model.pattern))  # each kind once, in their order
    if model.full_attention_every is not None:
        reach["full_attention_every"] = min(model.full_attention_every, 2)
    return reach


def _heads(model: ModelConfig, tensor: int) -> tuple[int, int]:
    """Key-value heads and query heads: one of them stays one, as many stay as many, groups stay groups."""
    given = model.kv_heads or model.heads
    if given == model.heads:
        heads = max(2, tensor) if given > 1 else 1
        return heads, heads
    ratio = min(model.heads // given, 4)
    if given == 1:
        return 1, max(4, 2 * tensor)
    kv_heads = max(2, tensor)
    return kv_heads, kv_heads * ratio


def _latent(latent: LatentConfig) -> LatentConfig:
    """Of a head's 12 channels 4 turn; ranks that no number of ranks divides."""
    if latent.kv_rank is None:
        return latent
    return replace(
        latent, kv_rank=10, q_rank=None if latent.q_rank is None else 14, rope_head_size=4, value_head_size=6
    )


def _lora(lora: LoraConfig, deviation: float) -> LoraConfig:
    """The same scale, a rank that no number of ranks divides, and a B through which A has a gradient."""
    if lora.rank is None:
        return lora
    alpha = None if lora.alpha is None else 3 * lora.alpha / lora.rank
    return replace(lora, rank=3, alpha=alpha, initial_std=deviation)


def _moe(moe: MoeConfig, layout: ParallelConfig, layers: int) -> MoeConfig:
    if not moe.experts:
        return moe
    tensor = layout.tensor
    wanted = max(2 * layout.expert, moe.top_k + (1 if moe.experts > moe.top_k else 0))
    if moe.groups > 1:  # a choice among groups stays one: fewer experts of a token than half of the groups have
        unit = math.lcm(4, layout.expert)
        most = unit * math.ceil(max(wanted, 8) / unit)
        groups = {"experts": most, "groups": 4, "top_groups": 2, "top_k": min(moe.top_k, most // 2)}
        groups["group_experts"] = min(moe.group_experts, most // 4)
    else:
        groups = {"experts": math.ceil(wanted / layout.expert) * layout.expert}
    return replace(
        moe,
        **groups,
        ffn_hidden_size=None if moe.ffn_hidden_size is None else max(32, 16 * tensor),
        shared_ffn_hidden_size=None if moe.shared_ffn_hidden_size is None else max(24, 12 * tensor),
        first_layer=min(moe.first_layer, 1, layers - 1),
    )


def _train(train: TrainConfig, layout: ParallelConfig, data: int) -> TrainConfig:
    """Few micro-batches, but a pipeline that fills, and a multiple of its stages for interleaved ones."""
    unit = layout.tensor * (2 * layout.context if layout.context > 1 else 1)
    micro_batches = layout.pipeline if layout.pipeline >= 4 else 2 * layout.pipeline
    micro_batch_size = min(train.micro_batch_size, 2)
    return replace(
        train,
        steps=STEPS,
        tokens=None,
        micro_batch_size=micro_batch_size,
        global_batch_size=micro_batch_size * micro_batches * data,
        sequence_length=math.ceil(16 / unit) * unit if unit <= 8 else 2 * unit,
    )


def _optimizer(optimizer: OptimizerConfig) -> OptimizerConfig:
    return replace(
        optimizer,
        learning_rate=_LEARNING_RATE,
        clip_norm=min(optimizer.clip_norm, _CLIP_NORM),
        schedule=ScheduleConfig(name=ScheduleName.constant),
    )


def _ranks_changed(config: RunConfig, ranks: int, degrees: dict[str, int]) -> Iterator[Change]:
    before, now = _degrees(config, ranks)["data"], degrees["data"]
    if ranks != math.prod(degrees.values()):
        yield Change(key="ranks", was=ranks, now=math.prod(degrees.values()))
    if before != now:
        yield Change(key="data parallel", was=before, now=now)


def _changes(before: RunConfig, now: RunConfig) -> Iterator[Change]:
    values, small = flatten(to_dict(before)), flatten(to_dict(now))
    values["train.steps"], values["train.tokens"] = total_steps(before), None
    for key, value in small.items():
        if value != values.get(key):
            yield Change(key=key, was=values.get(key), now=value)
