"""The rules of a layout: what does not go together, each with its reason and the nearest legal value.

What ZeRO cannot do is `parallel.mechanism`'s to say. Imports without torch.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

from data_pipeline.corruption import TARGET_UNIT
from launcher.config import RunConfig
from model.config import MoeConfig
from parallel.common.errors import Problem
from parallel.config import ParallelConfig, Recompute
from parallel.mechanism import refusals


def layout_problems(config: RunConfig, ranks: int) -> Iterator[Problem]:
    """Everything about `parallel` that cannot work on this many ranks; all numbers are above 0."""
    yield from _ranks(config, ranks)
    yield from _widths(config)
    yield from _depth(config)
    yield from _sequence(config)
    yield from _experts(config, ranks)
    yield from refusals(config.parallel, experts=config.model.moe.experts, optimizer=config.optimizer.name)
    yield from _batches(config, ranks)


def divisors(number: int) -> list[int]:
    """Every divisor, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def multiples(unit: int, near: int) -> list[int]:
    """The multiples of `unit` next to `near`, both sides, without 0."""
    return [multiple for multiple in (near // unit * unit, (near // unit + 1) * unit) if multiple]


def nearest(value: int, legal: Iterable[int]) -> int:
    """The legal value that is closest."""
    return min(legal, key=lambda candidate: abs(candidate - value))


def _model_ranks(layout: ParallelConfig) -> int:
    return layout.tensor * layout.pipeline * layout.context


def _ranks(config: RunConfig, ranks: int) -> Iterator[Problem]:
    layout, needed = config.parallel, _model_ranks(config.parallel)
    if ranks % needed:
        legal = f"tensor x pipeline x context = {needed} to divide the {ranks} ranks of this call (--ranks {needed})"
        widest = max(("tensor", "pipeline", "context"), key=lambda name: getattr(layout, name))
        yield Problem(key=f"parallel.{widest}", got=getattr(layout, widest), legal=legal)
    if layout.sequence_parallel is True and layout.tensor == 1:
        yield Problem(key="parallel.sequence_parallel", got=True, legal="auto or false where tensor is 1")


def _widths(config: RunConfig) -> Iterator[Problem]:
    """Whatever tensor ranks cut must be cut in equal parts."""
    model, tensor = config.model, config.parallel.tensor
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads or model.heads, "ffn_hidden_size": model.ffn_hidden_size}
    if model.moe.experts:
        sizes["moe.ffn_hidden_size"] = model.moe.ffn_hidden_size or model.ffn_hidden_size
        sizes["moe.shared_ffn_hidden_size"] = model.moe.shared_ffn_hidden_size or tensor
    if model.vocabulary_size is not None:
        sizes["vocabulary_size"] = model.vocabulary_size
    for key, size in sizes.items():
        if size % tensor:
            legal = f"a divisor of model.{key} = {size}, such as {nearest(tensor, divisors(size))}"
            yield Problem(key="parallel.tensor", got=tensor, legal=legal)


def _two_stacks(layout: ParallelConfig) -> Iterator[Problem]:
    """Each stack has one table of relative positions, so it stands on one stage."""
    if layout.pipeline > 2:
        legal = "1, or 2: the encoder on one stage and the decoder on the other, each with its table of positions"
        yield Problem(key="parallel.pipeline", got=layout.pipeline, legal=legal)
    if layout.virtual_pipeline > 1:
        legal = "1 with model.decoder_layers: a stack is not cut"
        yield Problem(key="parallel.virtual_pipeline", got=layout.virtual_pipeline, legal=legal)
    if layout.pipeline_split is not None:
        legal = "null with model.decoder_layers: the cut lies between encoder and decoder"
        yield Problem(key="parallel.pipeline_split", got=list(layout.pipeline_split), legal=legal)
    if layout.recompute.mode is not Recompute.none:
        legal = "none with model.decoder_layers: a table that all layers read would be reduced once a layer"
        yield Problem(key="parallel.recompute.mode", got=layout.recompute.mode.value, legal=legal)
    if layout.zero_stage == 3:
        legal = "at most 2 with model.decoder_layers: stage 3 gathers a table that all layers read out of order"
        yield Problem(key="parallel.zero_stage", got=3, legal=legal)


def _depth(config: RunConfig) -> Iterator[Problem]:
    layout, layers = config.parallel, config.model.layers
    if config.model.decoder_layers is not None:
        yield from _two_stacks(layout)
        return
    chunks, split = layout.pipeline * layout.virtual_pipeline, layout.pipeline_split
    if layout.virtual_pipeline > 1 and layout.pipeline == 1:
        yield Problem(key="parallel.virtual_pipeline", got=layout.virtual_pipeline, legal="1 where pipeline is 1")
    elif split is None and layers % chunks:
        even = nearest(layers, multiples(chunks, layers))
        legal = (
            f"a multiple of pipeline x virtual_pipeline = {chunks}, such as {even}, or parallel.pipeline_split given"
        )
        yield Problem(key="model.layers", got=layers, legal=legal)
    elif split is not None and (len(split) != chunks or sum(split) != layers or min(split) < 0):
        share, odd = divmod(layers, chunks)
        even_split = [share + (index < odd) for index in range(chunks)]
        legal = (
            f"one number for each of the {chunks} pipeline chunks (pipeline x virtual_pipeline), "
            f"which add up to model.layers = {layers}, such as {even_split}"
        )
        yield Problem(key="parallel.pipeline_split", got=list(split), legal=legal)
    elif config.model.lora.rank is not None and split is not None and not all(_stage_layers(layout, split)):
        legal = "layers on every stage with model.lora: a stage without any has nothing to train"
        yield Problem(key="parallel.pipeline_split", got=list(split), legal=legal)
    else:
        yield from _recompute(layout, max(split) if split else layers // chunks)


def _stage_layers(layout: ParallelConfig, split: Sequence[int]) -> list[int]:
    return [sum(split[stage :: layout.pipeline]) for stage in range(layout.pipeline)]


def _recompute(layout: ParallelConfig, blocks: int) -> Iterator[Problem]:
    wanted = layout.recompute
    if wanted.blocks is None:
        return
    if wanted.mode is not Recompute.full:
        legal = f"null with recompute.mode={wanted.mode.value}: only the mode full counts blocks"
        yield Problem(key="parallel.recompute.blocks", got=wanted.blocks, legal=legal)
    elif wanted.blocks > blocks:
        legal = f"at most {blocks}, which a pipeline chunk holds, or null for all"
        yield Problem(key="parallel.recompute.blocks", got=wanted.blocks, legal=legal)


def _sequence(config: RunConfig) -> Iterator[Problem]:
    """A sequence is cut into two chunks for each context rank, and what a rank holds again over the tensor ranks."""
    layout, length = config.parallel, config.train.sequence_length
    cut = layout.tensor if layout.sequence_parallel is not False else 1
    unit = math.lcm(2 * layout.context if layout.context > 1 else 1, layout.context * cut)
    if length % unit:
        parts = ["2 x parallel.context"] if layout.context > 1 else []
        parts += ["parallel.tensor with sequence parallelism"] if cut > 1 else []
        legal = f"a multiple of {unit} ({', and '.join(parts)}), such as {nearest(length, multiples(unit, length))}"
        yield Problem(key="train.sequence_length", got=length, legal=legal)
    if config.model.decoder_layers is not None and TARGET_UNIT % unit:
        legal = f"a divisor of {TARGET_UNIT}, of which the decoder's rows are a multiple, with what it is multiplied by"
        widest = "tensor" if layout.tensor >= layout.context else "context"
        yield Problem(key=f"parallel.{widest}", got=getattr(layout, widest), legal=legal)


def _experts(config: RunConfig, ranks: int) -> Iterator[Problem]:
    layout, model, moe = config.parallel, config.model, config.model.moe
    if not moe.experts:
        if layout.expert > 1:
            yield Problem(key="parallel.expert", got=layout.expert, legal="1 without model.moe.experts")
        return
    tokens = ranks // (layout.tensor * layout.pipeline) if ranks % _model_ranks(layout) == 0 else None
    if tokens is not None and tokens % layout.expert:
        legal = f"a divisor of data x context = {tokens}, such as {nearest(layout.expert, divisors(tokens))}"
        yield Problem(key="parallel.expert", got=layout.expert, legal=legal)
    if moe.experts % layout.expert:
        legal = (
            f"a divisor of model.moe.experts = {moe.experts}, such as {nearest(layout.expert, divisors(moe.experts))}"
        )
        yield Problem(key="parallel.expert", got=layout.expert, legal=legal)
    if moe.top_k > moe.experts:
        yield Problem(key="model.moe.top_k", got=moe.top_k, legal=f"at most model.moe.experts = {moe.experts}")
    if moe.top_k == 1 and moe.normalise_top_k:
        legal = (
            "false with model.moe.top_k = 1: the share of one expert would always be 1, and the router learn nothing"
        )
        yield Problem(key="model.moe.normalise_top_k", got=True, legal=legal)
    if moe.first_layer >= model.layers:
        legal = f"below model.layers = {model.layers}: else no layer has experts"
        yield Problem(key="model.moe.first_layer", got=moe.first_layer, legal=legal)
    if layout.tensor > 1 and layout.sequence_parallel is False:
        legal = "auto or true with experts and tensor > 1: else every tensor rank would send each token to its experts"
        yield Problem(key="parallel.sequence_parallel", got=False, legal=legal)
    yield from _groups(moe)
    if model.linear_bias:
        yield Problem(key="model.linear_bias", got=True, legal="false with experts, which have no biases")


def _groups(moe: MoeConfig) -> Iterator[Problem]:
    """Groups of experts, of which each token's experts come from few."""
    size = moe.experts // moe.groups
    if moe.experts % moe.groups:
        legal = f"a divisor of model.moe.experts = {moe.experts}, such as {nearest(moe.groups, divisors(moe.experts))}"
        yield Problem(key="model.moe.groups", got=moe.groups, legal=legal)
    elif moe.top_groups > moe.groups:
        yield Problem(key="model.moe.top_groups", got=moe.top_groups, legal=f"at most model.moe.groups = {moe.groups}")
    elif moe.group_experts > size:
        legal = f"at most the {size} experts of a group"
        yield Problem(key="model.moe.group_experts", got=moe.group_experts, legal=legal)
    elif moe.top_groups * size < moe.top_k:
        legal = f"enough for model.moe.top_k = {moe.top_k} experts: groups have {size} each"
        yield Problem(key="model.moe.top_groups", got=moe.top_groups, legal=legal)


def _batches(config: RunConfig, ranks: int) -> Iterator[Problem]:
    yield from _batch("train.global_batch_size", config.train.global_batch_size, config, ranks)
    for number, phase in enumerate(config.train.batch_size_ramp):
        key = f"train.batch_size_ramp.{number}.global_batch_size"
        yield from _batch(key, phase.global_batch_size, config, ranks)


def _batch(key: str, size: int, config: RunConfig, ranks: int) -> Iterator[Problem]:
    train, layout = config.train, config.parallel
    replicas = max(1, ranks // _model_ranks(layout))
    if size < train.micro_batch_size * replicas:
        legal = f"at least micro_batch_size x data-parallel ranks = {train.micro_batch_size * replicas}"
        yield Problem(key=key, got=size, legal=legal)
        return
    micro_batches = math.ceil(size / (train.micro_batch_size * replicas))
    if layout.virtual_pipeline > 1 and micro_batches % layout.pipeline:
        unit = train.micro_batch_size * replicas * layout.pipeline
        whole = nearest(size, multiples(unit, size))
        legal = (
            f"a multiple of {unit}, such as {whole}: with virtual_pipeline a rank's {micro_batches} micro-batches "
            f"must be a multiple of parallel.pipeline = {layout.pipeline}"
        )
        yield Problem(key=key, got=size, legal=legal)
