"""The most that a rank holds in a step, by kind, as arithmetic. Imports without torch.

Weights, gradients, masters and moments are `parallel.memory`'s, to the byte. Activations are `model.activations`' of
one micro-batch, times those that a stage has under way: in 1F1B (Narayanan et al., 2021, arXiv:2104.04473, section 2.2)
a stage starts as many as there are stages from it to the last; interleaved, megatron-core's warm-up. `buffers` are
those of collectives, gathered weights, and what one block's backward pass works with.

The peak is that of the last backward passes, or of the update, which needs this rank's gradients once more and no
activations, whichever is more.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from launcher.plan.facts import Facts
from launcher.plan.setting import Setting
from launcher.plan.stages import stage_chunks, stage_shapes
from model.activations import block_bytes, chunk_bytes, embedding_bytes, logits_bytes, output_bytes
from parallel.config import ParallelConfig, Recompute
from parallel.mechanism import Mechanism, mechanism
from parallel.memory import HOST, Sharing, Size, predicted

KINDS = ("weights", "gradients", "masters and moments", "activations", "logits", "buffers")
LIVE_WEIGHTS = 1_000_000_000
"""Elements that DeepSpeed's ZeRO-3 keeps gathered at a time, its default."""


def peak_bytes(setting: Setting) -> dict[str, int]:
    """By kind, on the rank that holds most."""
    return max(stages_bytes(setting), key=lambda held: sum(held.values()))


def stages_bytes(setting: Setting) -> list[dict[str, int]]:
    """By kind, for a rank of each pipeline stage that may be the fullest."""
    return [
        {
            **{kind: state[kind] for kind in KINDS[:3]},
            "activations": activations,
            "logits": logits,
            "buffers": state["buffers"] + buffers,
        }
        for state, activations, logits, buffers in _stages(setting)
    ]


def most_bytes(setting: Setting) -> int:
    """The sum of `peak_bytes`."""
    return max(state["all"] + sum(others) for state, *others in _stages(setting))


def _stages(setting: Setting) -> list[tuple[Mapping[str, int], int, int, int]]:
    """What a rank of each stage holds all the time, and its activations, logits and buffers besides."""
    layout, model, facts, batch = setting.layout, setting.model, setting.facts, setting.micro_batch
    working, last = _working(setting), layout.pipeline - 1
    known: dict[tuple[int, int, bool], int] = {}
    seen, found = set(), []
    for stage, (chunks, state) in enumerate(zip(stage_chunks(model.layers, layout), state_bytes(setting), strict=True)):
        kinds = tuple((len(layers), facts.mixtures(layers), layers.start == 0) for layers in chunks)
        if stage not in (0, last) and kinds in seen:
            continue  # later stages with the same layers have fewer micro-batches under way
        if stage:
            seen.add(kinds)
        for layers, kind in zip(chunks, kinds, strict=True):
            if kind not in known:
                known[kind] = chunk_bytes(model, layers, batch, layout.recompute)
        kept, logits = sum(known[kind] for kind in kinds), 0
        if stage == 0:
            kept += embedding_bytes(model, batch)
        if stage == last:
            kept += output_bytes(model, batch)
            logits = logits_bytes(model, setting.vocabulary_size, batch)[1]
        activations = int(kept * _under_way(setting, stage))
        more_in_update = max(0, state["update"] - activations - logits - working)
        found.append((state, activations, logits, working + more_in_update))
    return found


def state_bytes(setting: Setting) -> Sequence[Mapping[str, int]]:
    """For a rank of each pipeline stage, what depends neither on the micro-batch nor on recomputation: three kinds and
    `buffers`, `all` of them, and what the `update` needs besides."""
    layout = setting.layout
    return _state(
        setting.facts,
        (layout.tensor, layout.expert, layout.pipeline, layout.virtual_pipeline),
        tuple(layout.pipeline_split) if layout.pipeline_split else None,
        mechanism(
            layout,
            tied=setting.model.tie_embeddings,
            sharers=setting.data * layout.context,
            optimizer=setting.facts.optimizer.name,
        ),
        setting.width,
        setting.data * layout.context,
        layout.offload,
    )


@lru_cache(maxsize=4096)
def _state(
    facts: Facts,
    degrees: tuple[int, int, int, int],
    split: tuple[int, ...] | None,
    how: Mechanism,
    width: int,
    ranks: int,
    offload: bool,
) -> list[dict[str, int]]:
    averaged = facts.optimizer.average_decay is not None
    sharing = Sharing(ranks=ranks, expert_ranks=ranks // degrees[1], tensor_ranks=degrees[0])
    found: dict[tuple[int, int, int], dict[str, int]] = {}
    stages = []
    for sizes in _shapes(facts, degrees, split):
        frozen = sum(size.elements for size in sizes if size.is_frozen)
        key = (len(sizes), sum(size.elements for size in sizes), frozen)  # stages of one shape hold the same
        if key not in found:
            held = predicted(sizes, mechanism=how, width=width, sharing=sharing, offload=offload, averaged=averaged)
            gathered = width * min(key[1], LIVE_WEIGHTS) if how.stage == 3 else 0
            own = held["masters"] + held.get(f"{HOST}masters", 0)
            found[key] = {
                "weights": held["weights"],
                "gradients": held["gradients"],
                "masters and moments": held["masters"] + held["moments"] + held.get("averages", 0),
                "buffers": held["buffers"] + gathered,
                "update": own if how.stage in (1, 2) and not how.own else 0,
            }
            found[key]["all"] = sum(found[key][kind] for kind in (*KINDS[:3], "buffers"))
        stages.append(found[key])
    return stages


@lru_cache(maxsize=256)
def _shapes(
    facts: Facts,
    degrees: tuple[int, int, int, int],
    split: tuple[int, ...] | None,
) -> list[list[Size]]:
    tensor, expert, pipeline, virtual_pipeline = degrees
    layout = ParallelConfig(
        tensor=tensor,
        expert=expert,
        pipeline=pipeline,
        virtual_pipeline=virtual_pipeline,
        pipeline_split=None if split is None else list(split),
    )
    return stage_shapes(
        facts.model,
        layout,
        vocabulary_size=facts.vocabulary_size,
        optimizer=facts.optimizer,
        sequence_length=facts.sequence_length,
        known=facts.sizes.setdefault(tensor, {}),
    )


def _under_way(setting: Setting, stage: int) -> float:
    """Micro-batches whose activations a stage holds at most."""
    layout, count = setting.layout, setting.micro_batches
    if layout.virtual_pipeline == 1:
        return min(count, layout.pipeline - stage)
    warm_up = 2 * (layout.pipeline - stage - 1) + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(count * layout.virtual_pipeline, warm_up + 1) / layout.virtual_pipeline


def _working(setting: Setting) -> int:
    """Gradients of one block's activations while they are computed, sequences gathered for its matrices, and what is
    computed again for one block at a time."""
    model, batch = setting.model, setting.micro_batch
    inner = 3 * model.ffn_hidden_size // batch.tensor + 2 * model.hidden_size
    again = 0
    if setting.layout.recompute.mode is not Recompute.none:
        experts = model.moe.experts > 0
        modes = (Recompute.none, setting.layout.recompute.mode)
        whole, kept = (block_bytes(model, batch, mode, experts=experts) for mode in modes)
        again = whole - kept
    return batch.width * batch.tokens * inner + max(0, again)
