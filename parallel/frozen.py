"""Parameters that are not trained: no gradient, no master, no optimizer state; weights alone, in the model's precision.

They are in every checkpoint and export like all others, so that a run may freeze and unfreeze between two runs.
"""

import math
from collections.abc import Iterator, Sequence

from megatron.core.dist_checkpointing.mapping import ShardedTensor

from parallel.checkpoint.agreement import exchange
from parallel.common.errors import ConfigError, Problem
from parallel.config import OptimizerConfig
from parallel.fragments import cut
from parallel.parameters import Fragment, LocalParameter
from parallel.rules import is_frozen
from parallel.updater import Kind


def trained_and_frozen(
    parameters: Sequence[LocalParameter], config: OptimizerConfig
) -> tuple[list[LocalParameter], list[LocalParameter]]:
    """This rank's parameters in two; the second ask for no gradient from now on. Every rank calls this.

    Raises:
        ConfigError: on all ranks; a pipeline stage has nothing left to train.
    """
    frozen = [local for local in parameters if local.frozen or is_frozen(local.name, config)]
    trained = [local for local in parameters if not (local.frozen or is_frozen(local.name, config))]
    if (config.frozen or frozen) and not all(exchange(bool(trained))):
        legal = "patterns that leave every pipeline stage something to train: gradients pass through them all"
        raise ConfigError([Problem(key="optimizer.frozen", got=list(config.frozen), legal=legal)])
    for local in frozen:
        local.parameter.requires_grad_(False)
    return trained, frozen


def elements(parameters: Sequence[LocalParameter]) -> int:
    """Of the whole model's parameters that ranks hold these parts of, each counted once. Every rank calls this."""
    described = [shard.description for local in parameters for shard in local.shards]
    own = {each.key: math.prod(each.global_shape) for each in described}
    return sum({name: size for rank in exchange(own) for name, size in rank.items()}.values())


def frozen_pieces(local: LocalParameter) -> Iterator[ShardedTensor]:
    """What this rank holds of a frozen parameter: ZeRO-3 has cut it, nothing else has."""
    part = getattr(local.parameter, "ds_tensor", None)
    if part is None:
        yield from cut(local, Fragment(start=0, value=local.parameter.data.view(-1)), Kind.weight, shared=False)
        return
    start = part.numel() * local.parameter.ds_process_group.rank()  # type: ignore[attr-defined]
    elements = min(part.numel(), local.shape.numel() - start)
    if elements > 0:
        yield from cut(local, Fragment(start=start, value=part.data[:elements]), Kind.weight, shared=True)
