"""The machine that a run is on, as the planner's arithmetic takes it: configured, known by its name, or measured."""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from launcher.config import RunConfig
from launcher.plan.facts import Facts
from launcher.plan.hardware import Efficiency, Hardware, load, of_device
from launcher.plan.seconds import UPDATE_BYTES
from model.config import ModelConfig
from model.cross_entropy import ChunkedCrossEntropy, LogitForm, weighted_losses
from model.projections import BLOCK, ROW_PARALLEL, projections
from model.size import head_size
from parallel.config import Logits
from parallel.precision import model_dtype, on_this_machine
from parallel.topology import Topology

_TRIES, _ENOUGH_SECONDS = 4, 0.1
"""Of three and more the second best counts: the first one is slow, and others may be disturbed by what else runs. When
they have taken so long together, two will do."""
_SENT_BYTES = 1 << 22
_LARGEST = 1 << 22
"""Elements of a tensor, more than a cache holds in fp32."""
_OPERATIONS = 1_500_000_000
"""Of all products that are timed, once."""
_FEWEST_ROWS, _MOST_OUTPUTS = 96, 8192
_CALLS = 100
_LONGEST = 512
"""Tokens that attend to each other."""


_Timer = Callable[[Callable[[], object]], float]
"""Calls something several times and says how long it takes."""


def known_machine(config: RunConfig, device: torch.device) -> Hardware | None:
    """`tracking.hardware`, else the file of this accelerator; None where there is none, as for a CPU.

    Raises:
        UserError: the configured one is no hardware.
    """
    if config.tracking.hardware is not None:
        return load(config.tracking.hardware)
    return of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def measured_cpu(
    config: RunConfig, facts: Facts, topology: Topology, *, clock: Callable[[], float] = time.perf_counter
) -> Hardware:
    """What this CPU reaches in what the model's step consists of, while all ranks use it; in some 0.3 s.

    All ranks call this together. Each product of a block is timed at its own shape, forward and backward, in some of a
    micro-batch's tokens; so are the output layer with its cross-entropy, attention, what moves activations, an update,
    and the call of an operation. A product is as quick as it is, narrow or wide, and nothing hides behind a pass:
    collectives take the cores that the passes take.
    """
    model, dtype = config.model, model_dtype(config.precision)
    samples, length = config.train.micro_batch_size, config.train.sequence_length // config.parallel.context
    tokens, tensor = samples * length, config.parallel.tensor
    seconds = partial(_seconds, clock)
    latency, link_rate = _links(clock)
    peak = _product_rate(seconds, _products(config), tokens, dtype)
    output_rate = _output_rate(seconds, config, facts, tokens, topology)
    elements = min(_LARGEST, tokens * max(1, model.ffn_hidden_size // tensor))
    moved = torch.ones(max(1, _LARGEST // elements), elements, dtype=dtype)
    rate = 3 * moved.nbytes / seconds(lambda: [each * each for each in moved])  # kept meanwhile, as activations are
    return Hardware(
        name="this CPU, measured",
        peak_flops={on_this_machine(config.precision).value: peak},
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        reserved_bytes=1,
        memory_bytes_per_second=rate,
        node_bytes_per_second=link_rate,
        network_bytes_per_second=link_rate,
        host_bytes_per_second=rate,
        node_latency_seconds=latency,
        network_latency_seconds=latency,
        dollars_per_hour=1e-9,
        efficiency=Efficiency(
            matrices=1.0,
            attention=_attention_rate(seconds, model, min(length, _LONGEST), tensor, dtype) / peak,
            memory=1.0,
            links=1.0,
            output=output_rate / peak,
            cross_entropy=math.inf,  # in `output`
            update=_update_rate(seconds) / rate,
            hidden=0.0,
        ),
        narrow_width=0.0,
        call_seconds=_call_seconds(seconds),
    )


def _products(config: RunConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of a block's matrices on one tensor rank."""
    model, tensor = config.model, config.parallel.tensor
    if model.moe.experts:  # an expert's are what an MLP of that width would have
        model = replace(model, ffn_hidden_size=model.moe.ffn_hidden_size or model.ffn_hidden_size)
    found = []
    for linear in BLOCK:
        fused = projections(model, linear)
        assert fused is not None
        inputs, outputs = fused.parts[0].inputs, sum(part.outputs for part in fused.parts)
        cut = (inputs // tensor, outputs) if linear in ROW_PARALLEL else (inputs, outputs // tensor)
        found.append(cut)
    return found


def _product_rate(seconds: _Timer, shapes: Sequence[tuple[int, int]], tokens: int, dtype: torch.dtype) -> float:
    """Operations a second in a matrix's product and the two of its gradients."""
    rows = _rows(tokens, sum(map(math.prod, shapes)))
    held = [
        tuple(torch.ones(shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        for inputs, outputs in shapes
    ]

    def multiply() -> None:
        for read, matrix, gradient in held:
            _ = read @ matrix.T, gradient @ matrix, gradient.T @ read

    return 6 * rows * sum(map(math.prod, shapes)) / seconds(multiply)


def _rows(tokens: int, elements: int) -> int:
    """Of a micro-batch, as many as tell what matrices of so many elements take."""
    return min(tokens, max(_FEWEST_ROWS, _OPERATIONS // (6 * elements)))


def _output_rate(seconds: _Timer, config: RunConfig, facts: Facts, tokens: int, topology: Topology) -> float:
    """Operations a second of the output layer's products, in the time that these and the cross-entropy take; of one
    tensor rank by itself."""
    classes, dtype = config.model.classes.number, model_dtype(config.precision)
    outputs = classes or min(facts.vocabulary_size // topology.config.tensor, _MOST_OUTPUTS)
    learns, whole = classes > 0 or config.model.lora.rank is None, classes > 0 or config.parallel.logits is Logits.whole
    rows = _rows(tokens, outputs * config.model.hidden_size)
    hidden = torch.ones(rows, 1, config.model.hidden_size, dtype=dtype, requires_grad=True)
    matrix = torch.ones(outputs, config.model.hidden_size, dtype=dtype, requires_grad=learns)
    batch = {"labels": torch.zeros(1, rows, dtype=torch.int64), "loss_weights": torch.ones(1, rows)}
    in_chunks = ChunkedCrossEntropy(topology=replace(topology, config=replace(topology.config, tensor=1)))

    def compute() -> None:
        if whole:
            losses = weighted_losses(hidden @ matrix.T, batch, None)
        else:
            losses = in_chunks(hidden, matrix, batch, form=LogitForm(), bias=None)
        torch.autograd.grad(losses.total, (hidden, matrix) if learns else hidden)

    taken, once = seconds(compute), 0.0
    if learns and not whole:  # its gradient is made and multiplied, however many rows
        once = min(taken / 2, seconds(lambda: torch.zeros_like(matrix).add_(matrix * 2.0)))
    taken = once + (taken - once) * tokens / rows
    return (6 if learns else 4) * tokens * matrix.numel() / taken


def _attention_rate(seconds: _Timer, model: ModelConfig, length: int, tensor: int, dtype: torch.dtype) -> float:
    """Operations a second in a forward pass, of which the backward pass is two and a half."""
    channels, groups = head_size(model), model.kv_heads or model.heads
    query, key, value = (
        torch.ones(1, max(1, heads // tensor), length, channels, dtype=dtype, requires_grad=True)
        for heads in (model.heads, groups, groups)
    )

    def attend() -> None:
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=groups < model.heads)
        torch.autograd.grad(attended, (query, key, value), attended)

    return 3.5 * 2 * length * query.numel() / seconds(attend)


def _update_rate(seconds: _Timer) -> float:
    """Bytes a second that the arithmetic's count of what is moved for an element gives."""
    master = torch.nn.Parameter(torch.zeros(_LARGEST // 2))
    master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW([master], fused=True)

    def update() -> None:
        assert master.grad is not None
        torch.linalg.vector_norm(master.grad)
        master.grad.mul_(1.0)
        optimizer.step()

    return UPDATE_BYTES * master.numel() / seconds(update)


def _call_seconds(seconds: _Timer) -> float:
    """Of an operation on hardly anything, there and back."""
    nothing = torch.ones(1, requires_grad=True)

    def call() -> None:
        result = nothing
        for _ in range(_CALLS):
            result = result * 2.0
        torch.autograd.grad(result, nothing)

    return seconds(call) / _CALLS


def _links(clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds that a collective of nothing takes, and bytes a second of one way of a ring, over all ranks."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return 1e-6, 1e12
    seconds, sent = partial(_seconds, clock, enough=math.inf), torch.zeros(_SENT_BYTES // 4)  # as often on all ranks
    latency = seconds(lambda: dist.all_reduce(torch.zeros(1)))
    taken = max(seconds(lambda: dist.all_reduce(sent)) - latency, 1e-9)
    return latency, 2 * _SENT_BYTES * (ranks - 1) / ranks / taken


def _seconds(clock: Callable[[], float], work: Callable[[], object], *, enough: float = _ENOUGH_SECONDS) -> float:
    """Of some tries, which all ranks begin together, so that they share caches and memory as in a step."""
    dist.barrier()
    taken: list[float] = []
    while len(taken) < 2 or (len(taken) < _TRIES and sum(taken) < enough):
        started = clock()
        work()
        taken.append(clock() - started)
    return sorted(taken)[1 if len(taken) > 2 else 0]
