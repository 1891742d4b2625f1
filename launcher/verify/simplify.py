"""What a failure needs: features are taken away one by one, and those stay away without which it still fails.

What is left is the smallest setting that shows the bug, which says more than the error of a parameter: a failure that
needs unequal weights is one of averaging, one that needs positions is one of positions. Each try is a world of its own,
under a second; one step is enough for most.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from launcher.config import RunConfig
from launcher.validate import check_training
from launcher.verify.measure import Case
from launcher.verify.proof import Comparison, compared
from launcher.verify.shrink import STEPS
from model.config import Activation, Dispatcher, MoeConfig, MupConfig, Norm, NormPlacement, RopeScalingConfig
from parallel.common.errors import ConfigError
from parallel.config import Recompute, RecomputeConfig

_SECONDS = 20
"""How long a world may take that one was taken away from; it is no answer if it hangs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """Something that a case has and may do without."""

    name: str
    """As it stands in a sentence: `tensor parallel`."""
    present: Callable[[Case], bool]
    without: Callable[[Case], Case]


@dataclass(frozen=True, kw_only=True, slots=True)
class Minimal:
    """The smallest case that still fails in the same way."""

    comparison: Comparison
    needed: frozenset[str]
    """Names of the features that it has; without any of them it would not fail."""


def minimal(comparison: Comparison) -> Minimal:
    """Takes away whatever the failure of a comparison, which is not a crash, does not need."""
    steps = 1
    failing = compared(comparison.case, steps=steps)
    if not _same(failing, comparison):
        failing, steps = comparison, STEPS
    for feature in FEATURES:
        if not feature.present(failing.case):
            continue
        simpler = feature.without(failing.case)
        if not _legal(simpler):
            continue
        tried = compared(simpler, steps=steps, seconds=_SECONDS)
        if _same(tried, comparison):
            failing = tried
    needed = frozenset(feature.name for feature in FEATURES if feature.present(failing.case))
    return Minimal(comparison=failing, needed=needed)


def _same(found: Comparison, expected: Comparison) -> bool:
    """Whether two failures are of one kind: a quantity is wrong in both."""
    return found.crash is None and bool(found.failing & expected.failing)


def _legal(case: Case) -> bool:
    try:
        check_training(case.config, ranks=case.ranks)
    except ConfigError:
        return False
    return True


def changed(case: Case, values: Mapping[str, Any], *, ranks: int | None = None) -> Case:
    """The case with other values under dotted keys, `{"parallel.tensor": 1}`."""
    config: RunConfig = case.config
    for key, value in values.items():
        config = _set(config, key.split("."), value)
    return replace(case, config=config, ranks=case.ranks if ranks is None else ranks)


def _set(tree: Any, path: list[str], value: Any) -> Any:
    inner = value if len(path) == 1 else _set(getattr(tree, path[0]), path[1:], value)
    return replace(tree, **{path[0]: inner})


def _get(case: Case, key: str) -> Any:
    value: Any = case.config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _setting(name: str, key: str, plain: Any) -> Feature:
    """A feature that is one value of the configuration, other than `plain`."""
    return Feature(
        name=name, present=lambda case: _get(case, key) != plain, without=lambda case: changed(case, {key: plain})
    )


def _of_experts(name: str, key: str, plain: Any) -> Feature:
    """A feature of a mixture of experts."""
    setting = _setting(name, f"model.moe.{key}", plain)
    return replace(setting, present=lambda case: case.config.model.moe.experts > 0 and setting.present(case))


def _trait(name: str, field: str) -> Feature:
    """A feature of the synthetic batch."""
    return Feature(
        name=name,
        present=lambda case: getattr(case.traits, field),
        without=lambda case: replace(case, traits=replace(case.traits, **{field: False})),
    )


def _dimension(name: str, key: str, values: Mapping[str, Any]) -> Feature:
    """A dimension of the layout that takes ranks."""
    return Feature(
        name=name,
        present=lambda case: _get(case, key) > 1,
        without=lambda case: changed(case, {key: 1, **values}, ranks=case.ranks // _get(case, key)),
    )


def data_size(case: Case) -> int:
    """Data-parallel ranks of a case."""
    layout = case.config.parallel
    return case.ranks // (layout.tensor * layout.pipeline * layout.context)


def _lower_stage(case: Case) -> Case:
    stage = case.config.parallel.zero_stage - 1
    return changed(case, {"parallel.zero_stage": stage})


def _interleaving_off(case: Case) -> Case:
    split = case.config.parallel.pipeline_split
    return changed(case, {"parallel.virtual_pipeline": 1, "parallel.pipeline_split": split and None})


def _split_off(case: Case) -> Case:
    layout = case.config.parallel
    chunks = layout.pipeline * layout.virtual_pipeline
    return changed(case, {"parallel.pipeline_split": None, "model.layers": max(2, chunks)})


def _slices(case: Case) -> int:
    layout = case.config.parallel
    return layout.tensor * (2 * layout.context if layout.context > 1 else 1)


def _one_micro_batch(case: Case) -> Case:
    return changed(case, {"train.micro_batch_size": case.config.train.global_batch_size // data_size(case)})


_NO_PIPELINE = {"parallel.virtual_pipeline": 1, "parallel.pipeline_split": None}

FEATURES: tuple[Feature, ...] = (
    _setting("recomputation", "parallel.recompute", RecomputeConfig(mode=Recompute.none)),
    Feature(
        name="interleaved stages",
        present=lambda case: case.config.parallel.virtual_pipeline > 1,
        without=_interleaving_off,
    ),
    Feature(
        name="data parallel",
        present=lambda case: data_size(case) > 1,
        without=lambda case: replace(case, ranks=case.ranks // data_size(case)),
    ),
    _dimension("context parallel", "parallel.context", {}),
    _dimension("pipeline", "parallel.pipeline", _NO_PIPELINE),
    _dimension("tensor parallel", "parallel.tensor", {"parallel.sequence_parallel": "auto"}),
    _setting("expert parallel", "parallel.expert", 1),
    Feature(
        name="an uneven split",
        present=lambda case: case.config.parallel.pipeline_split is not None,
        without=_split_off,
    ),
    Feature(
        name="sequence parallel",
        present=lambda case: case.config.parallel.tensor > 1 and case.config.parallel.sequence_parallel is not False,
        without=lambda case: changed(case, {"parallel.sequence_parallel": False}),
    ),
    _setting("offloading", "parallel.offload", False),
    Feature(name="ZeRO-3", present=lambda case: case.config.parallel.zero_stage == 3, without=_lower_stage),
    Feature(name="ZeRO-2", present=lambda case: case.config.parallel.zero_stage == 2, without=_lower_stage),
    Feature(name="ZeRO-1", present=lambda case: case.config.parallel.zero_stage == 1, without=_lower_stage),
    Feature(
        name="bf16",
        present=lambda case: case.dtype is torch.bfloat16,
        without=lambda case: replace(case, dtype=torch.float32),
    ),
    _setting("experts", "model.moe", MoeConfig()),
    _of_experts("a shared expert", "shared_ffn_hidden_size", None),
    _of_experts("the load-balancing loss", "load_balance_loss", 0.0),
    _of_experts("a bias in the choice of experts", "expert_bias", False),
    _of_experts("groups of experts", "groups", 1),
    _of_experts("the router's z-loss", "z_loss", 0.0),
    _of_experts("the all-to-all dispatcher", "dispatcher", Dispatcher.allgather),
    _setting("muP", "model.mup", MupConfig()),
    _setting("tied embeddings", "model.tie_embeddings", False),
    _setting("norms of queries and keys", "model.qk_norm", False),
    _setting("attention biases", "model.attention_bias", False),
    _setting("biases", "model.linear_bias", False),
    _setting("dropout", "model.dropout", 0.0),
    _setting("a parallel residual", "model.parallel_residual", False),
    _setting("norms after attention and MLP", "model.post_norms", False),
    _setting("scaled embeddings", "model.scale_embeddings", False),
    _setting("capped attention scores", "model.attention_softcap", None),
    _setting("capped logits", "model.logit_softcap", None),
    _setting("channels that do not turn", "model.rope_share", 1.0),
    _setting("stretched positions", "model.rope_scaling", RopeScalingConfig()),
    _setting("a rotary base inside windows", "model.rope_local_base", None),
    _setting("layers beyond the window", "model.full_attention_every", None),
    _setting("kinds of layers", "model.pattern", None),
    _setting("a sliding window", "model.sliding_window", None),
    _setting("the next-sentence head", "model.next_sentence", False),
    _setting("norms after the sums", "model.norm_placement", NormPlacement.before),
    _setting("another norm", "model.norm", Norm.rms),
    _setting("another activation", "model.activation", Activation.swiglu),
    Feature(
        name="grouped heads",
        present=lambda case: case.config.model.kv_heads not in (None, case.config.model.heads),
        without=lambda case: changed(case, {"model.kv_heads": case.config.model.heads}),
    ),
    Feature(
        name="several micro-batches",
        present=lambda case: case.config.train.global_batch_size > case.config.train.micro_batch_size * data_size(case),
        without=_one_micro_batch,
    ),
    _trait("several documents in a row", "packed"),
    _trait("positions", "positioned"),
    _trait("unequal weights", "unequal"),
    Feature(
        name="labels behind a cut",
        present=lambda case: not case.traits.silent_slices and _slices(case) > 1,
        without=lambda case: replace(case, traits=replace(case.traits, silent_slices=_slices(case))),
    ),
)
"""In the order in which they are tried: first those that make a case smaller."""
