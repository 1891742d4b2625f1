"""`bloomery verify` catches what it is for: real code is broken in one place, and the proof says what and why.

Each bug trains on without an error. It is planted in this process, whose worlds inherit it by fork. `make test` plants
one of each kind (sums, scales, order, masks), `make soak` all of them.
"""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from launcher.verify.diagnose import diagnose
from launcher.verify.matrix import row
from launcher.verify.proof import proofs
from model import moe, norms
from model.language_model import LanguageModel
from model.objectives import Prediction
from parallel import engine, optimizer
from parallel.context import ContextParallel
from parallel.engine import Engine
from parallel.optimizer import PlainUpdater
from parallel.sharded import ShardedUpdater

pytestmark = [pytest.mark.distributed, pytest.mark.truth]

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml")


@dataclass(kw_only=True)
class Verdict:
    """What verify says of a layout that is not right."""

    proof: str
    wrong: dict[str, str | None]
    """What is wrong, and the parameter with the largest error."""
    cause: str

    def says(self, cause: str, *, of: str, what: str = "gradients", proof: str = "float64") -> None:
        assert self.proof == proof
        assert re.search(of, self.wrong[what] or ""), self.wrong
        assert re.search(cause, self.cause), self.cause


def verify(ranks: int, *overrides: str) -> Verdict:
    """The first proof of a layout that fails."""
    layout = row("planted", [CONFIG], ["train.micro_batch_size=1", "model.kv_heads=8", *overrides], ranks)
    failed = next(proof for proof in proofs(layout.proofs[0]) if not proof.passed)
    wrong = {check.what: check.worst for check in failed.comparison.checks if not check.passed}
    return Verdict(proof=failed.name, wrong=wrong, cause=diagnose(failed.comparison).cause)


def test_sequence_parallel_norms_not_summed_over_tensor_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "copy_to_tensor_model_parallel_region", lambda weight: weight)
    verify(2, "parallel.tensor=2").says(
        "gradients of norms are not summed over the tensor ranks: each holds the part of its own tokens", of="norm"
    )


def test_tied_embedding_not_summed_over_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer, "reduce_tied", lambda *_: None)
    verify(2, "parallel.pipeline=2", "model.tie_embeddings=true").says(
        "gradients of the tied embedding are not summed over the pipeline ranks", of="word_embeddings"
    )


@pytest.mark.long
def test_tied_embedding_counted_twice_in_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.local_parameters

    def nothing_is_a_copy(*arguments: Any, **options: Any) -> Any:
        return [replace(local, tied_copy=False) for local in real(*arguments, **options)]

    monkeypatch.setattr(engine, "local_parameters", nothing_is_a_copy)
    found = verify(2, "parallel.pipeline=2", "model.tie_embeddings=true")
    assert "gradient norm" in found.wrong
    assert "that of the tied embedding counts 2 times in the gradient norm" in found.cause


def test_loss_averaged_per_rank_instead_of_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours_alone(self: Engine, batch: Any) -> Tensor:
        return batch["loss_weights"].sum(dtype=torch.float64) * self.topology.data_parallel_size

    monkeypatch.setattr(Engine, "_weight", ours_alone)
    verify(2).says("the loss is averaged on each data-parallel rank", of=r"\w")


@pytest.mark.long
def test_labels_shifted_after_the_sequence_was_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Prediction.__call__

    def shifted_in_slices(self: Prediction, logits: Tensor, batch: dict[str, Tensor], tensor_group: Any) -> Any:
        labels, length = batch["labels"].clone(), batch["labels"].shape[1] // tensor_group.size()
        if tensor_group.size() > 1:
            labels[:, length - 1 :: length] = batch["tokens"][:, ::length]
        return right(self, logits, {**batch, "labels": labels}, tensor_group)

    monkeypatch.setattr(Prediction, "__call__", shifted_in_slices)
    verify(2, "parallel.tensor=2").says("labels are shifted after the sequence was cut", of=r"\w")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_gradients_that_zero_does_not_reduce(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    interleaved = ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "model.layers=4") if ranks == 4 else ()
    monkeypatch.setattr(ShardedUpdater, "_send", lambda _updater, everything=False: None)
    verify(ranks, *interleaved).says("something that takes ZeRO-1, data parallel", of=r"\w", proof="fp32 ZeRO-1")


def test_a_bucket_that_left_before_its_last_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_the_last(_updater: ShardedUpdater) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(ShardedUpdater, "all_but_last_micro_batch", always_the_last)
    cause = "RuntimeError: .*weight got a second gradient in the last backward pass"
    assert re.search(cause, verify(2).cause)


def test_context_chunks_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_they_come(self: ContextParallel, tensor: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(tensor, group=self.group) if self.size > 1 else tensor

    monkeypatch.setattr(ContextParallel, "gather", as_they_come)
    verify(2, "parallel.context=2").says("chunks of keys and values are gathered in a wrong order", of=r"\w")


@pytest.mark.long
def test_positions_not_offset_under_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ContextParallel.cut

    def from_the_start(self: ContextParallel, batch: Any) -> Any:
        cut = real(self, batch)
        return {**cut, "positions": batch["positions"][:, : cut["positions"].shape[1]]}

    monkeypatch.setattr(ContextParallel, "cut", from_the_start)
    verify(2, "parallel.context=2").says(
        "rotary positions of the context chunks are not those of their tokens", of=r"\w"
    )


def test_expert_gradients_scaled_by_the_wrong_group(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PlainUpdater.accumulation

    @contextmanager
    def scaled(self: PlainUpdater) -> Iterator[None]:
        with real(self):
            yield
        for local, gradient in zip(self.parameters, self.gradients, strict=True):
            if local.expert:
                gradient.div_(self.topology.config.expert)

    monkeypatch.setattr(PlainUpdater, "accumulation", scaled)
    verify(2, "model.moe.experts=4", "parallel.expert=2").says(
        r"gradients of experts are 0\.5 times .* wrong group \(1 / expert parallel size = 1 / 2\)", of="experts"
    )


@pytest.mark.long
def test_router_loss_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    real = moe.Router._losses
    monkeypatch.setattr(moe.Router, "_losses", lambda self, *given: real(self, *given) * self.group.size())
    verify(2, "model.moe.experts=4", "parallel.tensor=2").says("the router's losses count 2 times", of="router")


def test_the_same_dropout_masks_on_every_slice_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_the_first(self: LanguageModel, tokens: Tensor) -> Tensor:
        cut = self.topology.config.tensor if self.topology.sequence_parallel else 1
        return tokens.chunk(cut)[0]

    monkeypatch.setattr(LanguageModel, "own", always_the_first)
    verify(2, "model.dropout=0.1", "parallel.tensor=2").says("the same masks on every slice", of=r"\w")


@pytest.mark.long
def test_dropout_masks_that_differ_where_tensor_ranks_hold_the_same_activations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = LanguageModel.own

    def by_rank(self: LanguageModel, tokens: Tensor) -> Tensor:
        return real(self, tokens) + (self.topology.tensor_rank if tokens.dtype == torch.int64 else 0)

    monkeypatch.setattr(LanguageModel, "own", by_rank)
    verify(2, "model.dropout=0.1", "parallel.tensor=2", "parallel.sequence_parallel=false").says(
        "tensor ranks drop different elements where they hold the same activations", of=r"\w"
    )
