"""Where a step waits for its device: nowhere, unless its numbers are logged or saved.

On a CPU nothing waits, but what would is a call: everything through which a host takes a number out of a tensor is
caught here, with the file of ours (or of a library) that asks for it.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import launcher.train
from tests.launcher.tiny import ROOT, configuration, ran

_READING = (
    "item", "tolist", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "allclose", "masked_select",
    "__bool__", "__int__", "__float__", "__index__", "__array__",
)  # fmt: skip
_OF_THE_HOST = {
    "parallel/arrival.py Arrival.read": "a step late, when the copy is there",
    "launcher/preempt.py Preempt.agreed": "flags that never were on a device",
    "model/language_model.py LanguageModel.context": "ids of documents, which the batch brings on the host",
    "model/attention.py find_pieces": "the same",
    "model/attention.py <genexpr>": "the same",
    "model/cross_entropy.py _counted": "weights of tokens, which the batch brings on the host",
    "megatron/core/tensor_parallel/random.py CudaRNGStatesTracker.fork": "the state of the host's random numbers",
}
"""Who reads, and what."""


def _who() -> str:
    """Who is to blame: the innermost function that is not torch's, nor this file's."""
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__:
            name = name.removeprefix(f"{ROOT}/").partition("site-packages/")[2] or name.removeprefix(f"{ROOT}/")
            return f"{name} {frame.f_code.co_qualname}"
        frame = frame.f_back
    return "nobody"


class _Calls(TorchFunctionMode):
    """What Python asks of tensors."""

    def __init__(self, seen: Callable[[str], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READING:
            self._seen(func.__name__)
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    """What C++ asks of them."""

    def __init__(self, seen: Callable[[str], None]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self._seen(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "precision", "ranks"),
    [
        ({}, "bf16", 1),
        ({"zero_stage": 0}, "fp32", 2),
        ({"zero_stage": 1}, "fp32", 2),
        ({"zero_stage": 2}, "bf16", 2),
        ({"pipeline": 2, "zero_stage": 1}, "bf16", 2),
        ({"tensor": 2}, "bf16", 2),
    ],
    ids=["alone", "zero0", "zero1", "zero2", "pipeline", "tensor"],
)
def test_no_step_waits_whose_numbers_nobody_reads(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], precision: str, ranks: int
) -> None:
    original = launcher.train.take_steps

    def watched(parts: Any, records: Any) -> None:
        found: list[tuple[int, str, str]] = []

        def seen(what: str) -> None:
            found.append((parts.progress.step + 1, what, _who()))

        with _Calls(seen), _Kernels(seen):
            original(parts, records)
        (tmp_path / f"reads-{parts.topology.rank}.json").write_text(json.dumps(found))

    monkeypatch.setattr(launcher.train, "take_steps", watched)
    config = configuration(
        tmp_path,
        store,
        train={"steps": 8, "log_every_steps": 100},
        parallel=layout,
        checkpoint={"every_steps": 100},
        anomaly={"loss_spike": "skip", "replicas_every_steps": None},
    )
    ran("train", config, f"precision={precision}", ranks=ranks)
    for rank in range(ranks):
        found = json.loads((tmp_path / f"reads-{rank}.json").read_text())
        assert any(step > 8 and "launcher/meter.py" in who for step, _, who in found), "the last step is logged"
        waits = {(what, who) for step, what, who in found if 2 < step < 8 and who not in _OF_THE_HOST}
        assert not waits, f"of {len(found)} reads on rank {rank}"
