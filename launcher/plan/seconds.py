"""How long a step takes, by kind, as arithmetic. Imports without torch.

- Matrix products run at a share of the peak (`Efficiency.matrices`) that falls where a product is narrow; attention at
  a share of its own; what only moves data at a share of the memory's rate (the roofline of Williams et al., 2009,
  doi:10.1145/1498765.1498785). A backward pass costs two forward passes, attention's two and a half, because it
  recomputes its scores (Dao, 2023, arXiv:2307.08691). Recomputation adds a forward pass (Chen et al., 2016,
  arXiv:1604.06174), `selective` attention's alone (Korthikanti et al., 2022, arXiv:2205.05198).
- A frozen matrix costs its backward pass one forward pass, for it has no gradient of its own. An adapter on it is two
  narrow products, which cost what they read and write.
- A ring moves (n - 1) / n of the bytes over the slowest link (Patarasuk and Yuan, 2009,
  doi:10.1016/j.jpdc.2008.09.002); ranks of a group that share a node share its adapters.
- Tensor parallelism gathers and scatters the hidden states four times a block and pass (Shoeybi et al., 2019,
  arXiv:1909.08053; cut along the sequence, Korthikanti et al.).
- A pipeline idles for the other stages' passes, divided by the chunks of a rank (Narayanan et al., 2021,
  arXiv:2104.04473, section 2.2), and runs at the pace of its slowest stage.
- ZeRO's volumes are Rajbhandari et al.'s, 2020, arXiv:1910.02054, section 7; what hides behind a backward pass is
  what `parallel.mechanism` says is reduced in it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.plan.facts import Work
from launcher.plan.setting import Setting
from launcher.plan.stages import stage_chunks
from parallel.config import Recompute
from parallel.mechanism import Reduction, mechanism

KINDS = ("compute", "communication", "bubble", "optimizer")
UPDATE_BYTES = 60
"""Bytes that an update reads and writes for an element: gradient twice more for its norm and clipping, master, moments,
weight, in passes of their own."""
ADAPTER_KERNELS = 0.1
"""Of the kernels that a block starts, those that each adapter adds: 29 and 64 in the two passes of a plain block, 51
and 104 with seven adapters."""
CALLS, CALLS_IN_STEP = 107, 250
"""Operations of a block, there and back, and of a step besides: what a tiny model takes on a CPU, in multiples of the
smallest operation."""
HOST_BYTES_PER_SECOND = 20e9
"""Rate at which a host steps one rank's part of what is offloaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """One micro-batch in one block."""

    forward: float
    backward: float
    """But for what is computed again."""
    attention: float
    """Its part of the forward pass."""
    exposed: float
    """Communication of a forward pass that nothing hides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """One micro-batch on one stage."""

    forward: float
    backward: float
    exposed: float
    """Communication in both that nothing hides."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.exposed


def step_seconds(setting: Setting) -> dict[str, float]:
    """By kind; they add up to the step."""
    stages = _stages(setting)
    slowest = max(stages, key=lambda passes: passes.total)
    count = setting.micro_batches
    idle = sum(passes.total for passes in stages) - slowest.total
    sent = _sent(setting) * count if setting.layout.pipeline > 1 else 0.0
    return {
        "compute": count * (slowest.forward + slowest.backward),
        "communication": count * slowest.exposed + sent + _data(setting, slowest),
        "bubble": idle / setting.layout.virtual_pipeline,
        "optimizer": _update(setting) + CALLS_IN_STEP * setting.hardware.call_seconds,
    }


def ring_seconds(setting: Setting, count: float, ranks: int, stride: int) -> float:
    """For a collective that leaves or takes `count` bytes whole over ranks that are `stride` apart."""
    if ranks == 1 or count == 0:
        return 0.0
    machine = setting.hardware
    together = min(ranks, max(1, setting.node_ranks // stride))
    moved = count * (ranks - 1) / ranks
    if together == ranks:
        rate, latency = machine.node_bytes_per_second, machine.node_latency_seconds
    else:
        rate = min(machine.node_bytes_per_second, together * machine.network_bytes_per_second)
        latency = machine.network_latency_seconds
    return moved / (rate * machine.efficiency.links) + latency * math.log2(ranks)


def _stages(setting: Setting) -> list[Passes]:
    layout, facts = setting.layout, setting.facts
    blocks = {experts: _block(setting, work, experts) for experts, work in facts.work.items()}
    known: dict[tuple[object, ...], Passes] = {}
    found = []
    for stage, chunks in enumerate(stage_chunks(setting.model.layers, layout)):
        last = stage == layout.pipeline - 1
        kinds = [(len(layers), facts.mixtures(layers)) for layers in chunks]
        key = (last, *kinds)
        if key not in known:
            known[key] = _stage(setting, kinds, blocks, last=last)
        found.append(known[key])
    return found


def _stage(setting: Setting, kinds: Sequence[tuple[int, int]], blocks: Mapping[bool, _Block], *, last: bool) -> Passes:
    """Of one micro-batch, all chunks of a stage: how many layers each has, and how many of them with experts."""
    recompute = setting.layout.recompute
    forward = backward = exposed = 0.0
    for length, mixtures in kinds:
        if not length:
            continue
        share = (length if recompute.blocks is None else recompute.blocks) / length
        for experts, number in ((True, mixtures), (False, length - mixtures)):
            if not number:
                continue
            block = blocks[experts]
            full = recompute.mode is Recompute.full
            again = block.forward if full else block.attention if recompute.mode is Recompute.selective else 0.0
            forward += number * block.forward
            backward += number * (block.backward + share * again)
            exposed += number * (2 + share * full) * block.exposed
    if last:
        ahead, back = _output(setting)
        forward += ahead
        backward += back
    return Passes(forward=forward, backward=backward, exposed=exposed)


def _block(setting: Setting, work: Work, experts: bool) -> _Block:
    machine, batch = setting.hardware, setting.micro_batch
    share = machine.efficiency
    peak = setting.hardware.peak(setting.matrix_precision or setting.precision.value)
    narrowest = min(batch.tokens * work.tokens_share, setting.model.hidden_size, work.narrowest / batch.tensor)
    rate = peak * share.matrices * narrowest / (narrowest + machine.narrow_width)
    matrices = 2 * batch.tokens * work.matrices / batch.tensor / rate
    # Half of the scores are masked; a rank with a part of the sequence sees the whole of it.
    scores = 2 * batch.tokens * setting.sequence_length * work.query / batch.tensor
    attention = scores / (machine.peak(setting.precision.value) * share.attention)
    fused = setting.software.fused
    inner, heads = (work.fused_inner, 2 * work.rotated) if fused else (work.inner, 8 * work.rotated)
    moved = 10 * setting.model.hidden_size * batch.between + (inner + heads) * batch.tokens / batch.tensor
    moving = batch.width / (machine.memory_bytes_per_second * share.memory)
    total = matrices + attention + moved * moving
    least = setting.software.block_seconds * (1 + ADAPTER_KERNELS * len(work.adapters))
    frozen = matrices if setting.model.lora.rank is not None else 0.0
    ahead, back = (elements * moving for elements in _moved_by_adapters(setting, work))
    calls = machine.call_seconds * CALLS * (1 + ADAPTER_KERNELS * len(work.adapters))
    return _Block(
        forward=max(total + ahead + calls / 3, least),
        backward=max(2 * total - frozen + back + calls * 2 / 3, 2 * least) + 0.5 * attention,
        attention=attention,
        exposed=_within_block(setting, work, experts),
    )


def _moved_by_adapters(setting: Setting, work: Work) -> tuple[float, float]:
    """Elements that the adapters of a block read and write. Forward: what A reads; what B gives, that of several
    projections put side by side, scaled, and added to what the matrix gave. Backward: the gradient scaled and read by
    both products; what A read once more, and its gradient added to that of the matrix."""
    batch = setting.micro_batch
    ahead = back = 0.0
    for adapter in work.adapters:
        read = adapter.inputs * (batch.tokens / batch.tensor if adapter.is_row else batch.between)
        given = adapter.outputs * (batch.between if adapter.is_row else batch.tokens / batch.tensor)
        ahead += read + (6 if adapter.is_row else 8) * given
        back += 5 * read + 4 * given
    return ahead, back


def _within_block(setting: Setting, work: Work, experts: bool) -> float:
    """Collectives of a block's forward pass that nothing hides."""
    layout, batch, software = setting.layout, setting.micro_batch, setting.software
    hidden = batch.width * batch.tokens * setting.model.hidden_size
    found = 0.0
    if layout.tensor > 1:
        # Two gathers and two scatters, or two all-reduces, which are both.
        found += 4 * software.tensor * ring_seconds(setting, hidden, layout.tensor, 1)
        low = batch.width * batch.tokens * (setting.model.lora.rank or 0)
        found += len(work.adapters) * ring_seconds(setting, low, layout.tensor, 1)
    if layout.context > 1:
        gathered = 2 * batch.width * batch.tokens * layout.context * work.key_value / layout.tensor
        found += software.context * ring_seconds(setting, gathered, layout.context, layout.tensor)
    if experts and layout.expert > 1:
        sent = setting.model.moe.top_k * hidden / layout.tensor
        found += 2 * ring_seconds(setting, sent, layout.expert, layout.tensor)
    return found


def _output(setting: Setting) -> tuple[float, float]:
    """Output layer and cross-entropy of one micro-batch, forward and backward."""
    batch, machine = setting.micro_batch, setting.hardware
    logits = batch.tokens * setting.outputs
    share = machine.efficiency
    matrix = 2 * logits * setting.model.hidden_size / (machine.peak(setting.precision.value) * share.output)
    matrix /= share.matrices
    rate = machine.memory_bytes_per_second * (share.cross_entropy or share.memory)
    passes = 4 * 8 + batch.width * 3  # logits in fp32 read and written some four times, in their own format thrice
    memory = logits * passes / rate
    learns = setting.model.lora.rank is None or setting.model.classes.number
    return matrix + memory / 3, (2 if learns else 1) * matrix + memory * 2 / 3


def _sent(setting: Setting) -> float:
    """Hidden states between stages, of one micro-batch, there and back, for a stage that receives and sends."""
    layout, batch, machine = setting.layout, setting.micro_batch, setting.hardware
    count = batch.width * batch.between * setting.model.hidden_size
    near = setting.ranks <= setting.node_ranks
    rate = machine.node_bytes_per_second if near else machine.network_bytes_per_second
    latency = machine.node_latency_seconds if near else machine.network_latency_seconds
    return 2 * layout.virtual_pipeline * (count / (rate * machine.efficiency.links) + latency)


def _data(setting: Setting, slowest: Passes) -> float:
    """Gradients and weights over the data-parallel ranks, as far as no pass hides them."""
    layout, model = setting.layout, setting.model
    ranks = setting.data * layout.context
    if ranks == 1:
        return 0.0
    how = mechanism(layout, tied=model.tie_embeddings, sharers=ranks, optimizer=setting.facts.optimizer.name)
    trained = trained_elements(setting)
    gathered = stage_elements(setting) if how.stage == 3 else trained
    gradients = ring_seconds(setting, setting.software.gradient_width * trained, ranks, layout.tensor)
    weights = ring_seconds(setting, setting.width * gathered, ranks, layout.tensor)
    count = setting.micro_batches
    # Interleaved, as many micro-batches as there are stages pass a chunk before the next one's turn: the first chunks'
    # weights are needed, and the last chunks' gradients are there, that many passes before the others.
    passes = min(count, layout.pipeline) if layout.virtual_pipeline > 1 else 1
    hidden = setting.hardware.efficiency.hidden * passes
    ahead, back = hidden * slowest.forward, hidden * slowest.backward
    if how.stage == 0:
        return 2 * gradients
    if not setting.software.in_parts:
        gradients, weights = 2 * gradients, 2 * weights
    if how.stage == 3:
        one_block = (weights + gradients) / max(1, model.layers)
        return count * (max(0.0, weights - ahead) + max(0.0, weights + gradients - back) + one_block)
    after = max(0.0, weights - ahead) if setting.software.gathers_ahead else weights
    if how.reduction is Reduction.at_the_end and not setting.software.reduces_early:
        return gradients + after
    if how.reduction is not Reduction.in_every_backward:
        return max(0.0, gradients - back) + after
    return count * max(0.0, gradients - back) + after


def stage_elements(setting: Setting) -> float:
    """Parameters of a rank of an average stage."""
    layout, model, facts = setting.layout, setting.model, setting.facts
    matrices = 0.0
    for experts, work in facts.work.items():
        matrices += facts.blocks(experts=experts) * (work.held + work.held_in_experts / layout.expert)
    ends = (1 if model.tie_embeddings or model.classes.number else 2) * setting.vocabulary_size * model.hidden_size
    own = (matrices / layout.pipeline + ends / min(2, layout.pipeline)) / layout.tensor
    return own if model.lora.rank is None else own + _adapter_elements(setting)


def trained_elements(setting: Setting) -> float:
    """Those of them that are trained."""
    return stage_elements(setting) if setting.model.lora.rank is None else _adapter_elements(setting)


def _adapter_elements(setting: Setting) -> float:
    """Of a factor that is not cut every tensor rank has the whole."""
    layout, facts = setting.layout, setting.facts
    found = 0.0
    for experts, work in facts.work.items():
        for adapter in work.adapters:
            cut, whole = (adapter.inputs, adapter.outputs) if adapter.is_row else (adapter.outputs, adapter.inputs)
            found += facts.blocks(experts=experts) * (cut / layout.tensor + whole)
    return found * (setting.model.lora.rank or 0) / layout.pipeline


def _update(setting: Setting) -> float:
    """Norm, clipping and AdamW on this rank's part."""
    layout, machine = setting.layout, setting.hardware
    elements = trained_elements(setting)
    if layout.zero_stage:
        elements /= setting.data * layout.context
    if layout.offload:
        return elements * (6 / machine.host_bytes_per_second + UPDATE_BYTES / HOST_BYTES_PER_SECOND)
    share = machine.efficiency.update or machine.efficiency.memory
    return UPDATE_BYTES * elements / (machine.memory_bytes_per_second * share)
