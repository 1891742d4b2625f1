"""Products in eight bits: near those of float64, refused where there is no kernel, and what training shows of them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from launcher.config import RunConfig
from launcher.validate import check_training
from launcher.verify.measure import Case, engine_of
from launcher.verify.world import run_world
from model import fp8
from parallel.common.errors import ConfigError
from parallel.config import Precision
from tests.distributed.layouts import tiny


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.truth
def test_products_are_those_of_float64_to_a_few_percent() -> None:
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 8, 64, generator=random) * 3
    hidden[0, 0, 0] = 40  # an outlier, as activations have them
    weight, given = torch.randn(32, 64, generator=random) * 0.02, torch.randn(6, 8, 32, generator=random) * 1e-6
    errors = []
    for dtype, product in ((torch.float64, torch.nn.functional.linear), (torch.bfloat16, fp8.linear)):
        own, matrix = (each.to(dtype).requires_grad_() for each in (hidden, weight))
        result = product(own, matrix)
        result.backward(given.to(dtype))
        assert own.grad is not None
        assert matrix.grad is not None
        errors.append([result.detach().double(), own.grad.double(), matrix.grad.double()])
    for truth, found in zip(*errors, strict=True):
        assert 5e-3 < relative(found, truth) < 0.08  # e4m3 rounds by at most a sixteenth, e5m2 by an eighth


@pytest.mark.truth
def test_a_bias_a_frozen_matrix_and_zeros() -> None:
    hidden = torch.zeros(16, 32, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.ones(16, 32, dtype=torch.bfloat16), torch.arange(16, dtype=torch.bfloat16)
    result = fp8.linear(hidden, weight, bias)
    assert torch.equal(result, bias.expand(16, 16))
    result.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, torch.full_like(hidden, 16.0))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"parallel": {"tensor": 2}}, "precision"),
        ({"model": {"ffn_hidden_size": 72}}, "model.ffn_hidden_size"),
        ({"train": {"sequence_length": 12, "micro_batch_size": 1}}, "train.sequence_length"),
    ],
)
def test_what_has_no_kernel_is_refused(overrides: dict[str, dict[str, int]], key: str) -> None:
    case = tiny(2)
    data = replace(case.config.data, store="anywhere")
    config: RunConfig = replace(case.config, precision=Precision.fp8, data=data)
    for section, values in overrides.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(ConfigError) as caught:
        check_training(config, ranks=2)
    assert key in [problem.key for problem in caught.value.problems]


def chain(config: RunConfig, step: int) -> dict[str, Tensor]:
    """New rows of a language in which each token has four successors: no model gets below log 4 = 1.386 nats."""
    rows, length, vocabulary = config.train.global_batch_size, config.train.sequence_length, 64
    successors = torch.randint(0, vocabulary, (vocabulary, 4), generator=torch.Generator().manual_seed(0))
    random = torch.Generator().manual_seed(step + 1)
    tokens = torch.randint(0, vocabulary, (rows, length + 1), generator=random)
    choices = torch.randint(0, 4, (rows, length), generator=random)
    for place in range(length):
        tokens[:, place + 1] = successors[tokens[:, place], choices[:, place]]
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_weights": torch.ones(rows, length),
        "positions": torch.arange(length).repeat(rows, 1),
        "document_ids": torch.zeros(rows, length, dtype=torch.int32),
        "sample_ids": torch.arange(rows) + step * rows,
    }


def learnt(case: Case, steps: int) -> tuple[int, float, float]:
    """How many matrices are multiplied in eight bits; the loss of held-out rows before and after some steps."""
    engine = engine_of(case)
    eight = [
        module
        for module in engine.updater.module.modules()
        if getattr(vars(module).get("forward"), "args", (None, None))[1:] == (fp8.linear,)
    ]

    def held_out() -> float:
        return sum(float(engine.evaluate(chain(case.config, 10_000 + number)).loss) for number in range(8)) / 8

    before = held_out()
    for step in range(steps):
        engine.step(chain(case.config, step))
    return len(eight), before, held_out()


@pytest.mark.distributed
@pytest.mark.truth
@pytest.mark.parametrize("steps", [30, pytest.param(300, marks=pytest.mark.long)])
def test_the_loss_is_that_of_bf16(steps: int) -> None:
    """Within half a percent, on rows that training did not see."""
    case = tiny(1, dtype=torch.bfloat16)
    train = replace(case.config.train, global_batch_size=16, micro_batch_size=8)
    config = replace(case.config, train=train, optimizer=replace(case.config.optimizer, learning_rate=5e-3))
    found = {}
    for precision in (Precision.bf16, Precision.fp8):
        each = replace(case, config=replace(config, precision=precision))
        ((matrices, before, found[precision]),) = run_world(learnt, 1, each, steps, seconds=300)
        assert matrices == (4 * config.model.layers if precision is Precision.fp8 else 0)
        assert before - found[precision] > (2 if steps == 300 else 0.5)
    assert found[Precision.fp8] == pytest.approx(found[Precision.bf16], rel=5e-3)
    assert found[Precision.fp8] != found[Precision.bf16]
