"""Operations of our own beside those of torch that they stand for: the same results and gradients in float64, and in
narrower formats no further from float64 than torch's."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, rms_norm, silu

from model.config import Activation
from model.gate import _Gated
from model.norms import OneRMSNorm

pytestmark = pytest.mark.truth
EPS = 1e-5


def torch_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(hidden, weight.shape, weight, EPS)


def our_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return OneRMSNorm.apply(hidden, weight, EPS)


def torch_gate(activation: Callable[[Tensor], Tensor], both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return activation(gate) * up


def our_gate(kind: Activation, both: Tensor) -> Tensor:
    return _Gated.apply(both, kind)


def found(function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients, in float64."""
    own = [each.to(dtype).clone().requires_grad_() for each in inputs]
    result = function(*own)
    result.backward(
        torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    )
    assert result.dtype == dtype
    gradients = [each.grad for each in own]
    assert all(gradient is not None and gradient.dtype == dtype for gradient in gradients)
    return [each.detach().double() for each in (result, *gradients) if each is not None]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


NORMED = [2.0 * draw(5, 3, 40), 1 + 0.1 * draw(40)]
CASES = {
    "norm": (torch_norm, our_norm, NORMED),
    "norm of heads in a projection": (
        lambda both, weight: torch_norm(both.unflatten(-1, (2, 40))[..., 1, :], weight),
        lambda both, weight: our_norm(both.unflatten(-1, (2, 40))[..., 1, :], weight),
        [draw(5, 3, 80), NORMED[1]],
    ),
    "norm of zeros": (torch_norm, our_norm, [torch.zeros(2, 3, 40, dtype=torch.float64), NORMED[1]]),
    "swiglu": (partial(torch_gate, silu), partial(our_gate, Activation.swiglu), [3.0 * draw(5, 3, 40)]),
    "geglu": (
        partial(torch_gate, partial(gelu, approximate="tanh")),
        partial(our_gate, Activation.geglu),
        [3.0 * draw(5, 3, 40)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ours_is_torchs_in_float64(name: str) -> None:
    theirs, ours, inputs = CASES[name]
    for expected, own in zip(found(theirs, inputs, torch.float64), found(ours, inputs, torch.float64), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in CASES if name != "norm of zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ours_is_as_exact_as_torchs(name: str, dtype: torch.dtype) -> None:
    theirs, ours, inputs = CASES[name]
    rounded = [each.to(dtype).double() for each in inputs]
    truth, expected, own = (
        found(function, rounded, kind) for function, kind in ((theirs, torch.float64), (theirs, dtype), (ours, dtype))
    )
    for true, their_own, our_own in zip(truth, expected, own, strict=True):
        limit = (their_own - true).norm() / true.norm()
        assert 0 < (our_own - true).norm() / true.norm() <= 1.3 * limit


def test_what_is_kept_is_the_input() -> None:
    """And a number for each token."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hidden, weight = (each.float().requires_grad_() for each in NORMED)
    both = draw(5, 3, 40).float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        our_norm(hidden, weight)
        our_gate(Activation.swiglu, both)
    assert [each.numel() for each in kept] == [hidden.numel(), weight.numel(), 15, both.numel()]
