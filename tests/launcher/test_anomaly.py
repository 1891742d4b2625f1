"""Numbers that go wrong: seen before the update by all ranks together, and what each policy makes of them."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.batch_sizes import BatchSizes
from launcher.anomaly.config import AnomalyConfig, Policy
from launcher.anomaly.judge import Judge, RollBack
from launcher.preempt import Preempt
from launcher.progress import Progress
from launcher.run_directory import RunDirectory
from parallel.checkpoint.manifest import Manifest, whole_steps
from parallel.engine import Engine, StepResult
from tests.launcher.test_train import records
from tests.launcher.tiny import configuration, outcome_of, ran, run

EVERY_STEP = {"every_steps": 1, "keep": 20}


SELDOM = {"steps": 12, "log_every_steps": 100}
"""Logged at the first and the last step alone: others are judged one step late."""


def gradient_becomes(monkeypatch: pytest.MonkeyPatch, value: float, where: Callable[[Engine, dict], bool]) -> None:
    """Spoils one element of one parameter's gradient in the backward passes of chosen steps."""
    original = Engine.accumulate

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    def patched(self: Engine, batch: Any) -> StepResult:
        handle = None
        if where(self, batch):
            handle = self.parameters[-1].parameter.register_hook(spoil)
        result = original(self, batch)
        if handle is not None:
            handle.remove()
        return result

    monkeypatch.setattr(Engine, "accumulate", patched)


def on_rank(rank: int, *steps: int) -> Callable[[Engine, dict], bool]:
    """Where one rank takes one of these steps."""
    return lambda engine, batch: engine.topology.rank == rank and engine.schedule.steps_taken + 1 in steps


def tensors(directory: Path, step: int) -> dict[str, str]:
    """Hashes of the files with weights and moments of a checkpoint."""
    manifest = Manifest.read(whole_steps(RunDirectory(directory / "run").checkpoints)[step])
    return {name: record.hash for name, record in manifest.files.items() if name.startswith("tensors/")}


def anomalies(directory: Path) -> list[dict[str, Any]]:
    """The events that say that something was out of the ordinary."""
    return [event for event in RunDirectory(directory / "run").events if event["event"] == "anomaly"]


@pytest.mark.fault(
    number=23,
    fault="NaN or infinity in one rank's gradient, at every ZeRO stage, in fp32 and bf16, anomaly.not_finite=skip",
    holds="all ranks skip that step; weights and moments keep every bit; the run goes on",
    back_after="at once, with the next step",
)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ({"zero_stage": 0}, "fp32"),
        ({"zero_stage": 1}, "bf16"),
        ({"zero_stage": 2}, "bf16"),
        ({"zero_stage": 3}, "fp32"),
        ({"pipeline": 2, "zero_stage": 1}, "fp32"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_by_all_and_changes_nothing(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], precision: str
) -> None:
    gradient_becomes(monkeypatch, math.nan if layout["zero_stage"] else math.inf, on_rank(1, 3))
    config = configuration(
        tmp_path,
        store,
        train={"steps": 5},
        parallel=layout,
        checkpoint=EVERY_STEP,
        anomaly={"not_finite": "skip", "replicas_every_steps": 1},
    )
    said = ran("train", config, f"precision={precision}", ranks=2)
    (found,) = anomalies(tmp_path)
    assert (found["step"], found["kind"], found["policy"]) == (3, "not_finite", "skip")
    assert "the gradient norm of step 3 is not finite: its update is not made" in said
    assert tensors(tmp_path, 3) == tensors(tmp_path, 2)
    assert tensors(tmp_path, 4) != tensors(tmp_path, 3)
    metrics = {record["step"]: record for record in RunDirectory(tmp_path / "run").metrics}
    assert [metrics[step]["skipped_steps"] for step in range(1, 6)] == [0, 0, 1, 0, 0]
    assert metrics[3]["grad_norm"] is None
    assert metrics[3]["loss"] is not None


@pytest.mark.fault(
    number=23,
    fault="NaN in one rank's copy of a weight, anomaly.not_finite=skip",
    holds="the step is skipped, the copy is written anew from the masters, the next step is finite",
    back_after="at once, with the next step",
)
@pytest.mark.distributed
def test_a_copy_of_a_weight_that_went_bad_is_written_anew(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Engine.accumulate

    def patched(self: Engine, batch: Any) -> StepResult:
        if on_rank(1, 3)(self, batch):
            self.parameters[-1].parameter.data.view(-1)[0] = math.nan
        return original(self, batch)

    monkeypatch.setattr(Engine, "accumulate", patched)
    config = configuration(tmp_path, store, train={"steps": 5}, anomaly={"not_finite": "skip"})
    ran("train", config, ranks=2)
    written = list(RunDirectory(tmp_path / "run").metrics)
    assert [record["loss"] is None for record in written] == [False, False, True, False, False]
    assert None in written[2]["loss_by_source"].values()


@pytest.mark.fault(
    number=23,
    fault="NaN in one rank's gradient, anomaly.not_finite=stop",
    holds="both ranks end at the same step with 1 and a sentence; nothing of it is saved",
    back_after="stopped, as the policy says",
)
@pytest.mark.distributed
def test_stop_ends_all_ranks_unsaved(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradient_becomes(monkeypatch, math.nan, on_rank(1, 6))
    said = ran("train", configuration(tmp_path, store), ranks=2, code=1)
    outcome = outcome_of(tmp_path)
    assert "the gradient norm of step 6 is not finite: the run ends here, unsaved" in outcome.message
    assert list(whole_steps(tmp_path / "run/checkpoints")) == [4]
    assert said.count("Traceback") >= 1


@pytest.mark.fault(
    number=23,
    fault="samples that give NaN, anomaly.not_finite=rollback",
    holds="back to the checkpoint, on behind those samples; the loader's state and ledger know; no step stands twice",
    back_after=0.1,
)
@pytest.mark.distributed
def test_a_rollback_jumps_over_the_data(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, bad = tmp_path / "plain", tmp_path / "bad"
    for directory in (plain, bad):
        directory.mkdir()
    ran("train", configuration(plain, store), ranks=2)
    gradient_becomes(monkeypatch, math.nan, lambda _engine, batch: 6 * 4 - 1 in batch["sample_ids"])
    config = configuration(bad, store, anomaly={"not_finite": "rollback"})
    said = ran("train", config, ranks=2)
    mine, theirs = records(bad), records(plain)
    assert [record["step"] for record in mine] == list(range(1, 13))
    assert mine[:4] == theirs[:4]
    assert [record["batch_hash"] for record in mine[4:10]] == [record["batch_hash"] for record in theirs[6:12]]
    (event,) = [event for event in RunDirectory(bad / "run").events if event["event"] == "rolled_back"]
    assert (event["step"], event["from_step"], event["jumped_samples"]) == (4, 6, 8)
    assert "back to the checkpoint of step 4, and on behind 8 samples that are jumped over" in said
    state = json.loads((bad / "run/checkpoints/step-00000012/state.json").read_text())["loader"]
    assert state["jumped"] == [[16, 24]]
    assert state["position"] == 12 * 4 + 8
    assert sum(state["ledger"].values()) == pytest.approx(12 * 4 * 32, rel=0.1)
    resumed = run("train", config, "train.steps=14", "checkpoint.allow_changes=[train.steps]", ranks=2)
    assert resumed[0] == [0, 0], resumed[1]


@pytest.mark.distributed
def test_what_is_judged_one_step_late_ends_as_if_it_were_judged_at_once(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the sixth step, which is bad, nobody reads a number at its end; the eighth is saved."""
    at_once, late = tmp_path / "at-once", tmp_path / "late"
    gradient_becomes(monkeypatch, math.nan, lambda _engine, batch: 6 * 4 - 1 in batch["sample_ids"])
    for policy in ("skip", "rollback", "stop"):
        for directory, train in ((at_once / policy, {"steps": 12}), (late / policy, SELDOM)):
            directory.mkdir(parents=True)
            config = configuration(directory, store, train=train, anomaly={"not_finite": policy})
            codes, said = run("train", config, "precision=bf16")
            assert codes == ([1] if policy == "stop" else [0]), said
            assert "the gradient norm of step 6 is not finite" in said
        saved = whole_steps(late / policy / "run/checkpoints")
        assert list(saved) == list(whole_steps(at_once / policy / "run/checkpoints"))
        for step in saved:
            assert tensors(late / policy, step) == tensors(at_once / policy, step)
        (mine,), (its,) = anomalies(late / policy), anomalies(at_once / policy)
        assert (mine["step"], mine["cause"], mine["policy"]) == (its["step"], its["cause"], its["policy"])
    assert list(RunDirectory(late / "skip/run").metrics)[-1]["skipped_steps"] == 1


@pytest.mark.distributed
def test_a_bad_step_is_not_saved_though_nobody_has_read_it(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient_becomes(monkeypatch, math.nan, on_rank(0, 8))
    said = ran("train", configuration(tmp_path, store, train=SELDOM), code=1)
    assert "the gradient norm of step 8 is not finite: the run ends here, unsaved" in said
    assert list(whole_steps(tmp_path / "run/checkpoints")) == [4]


@pytest.mark.distributed
def test_a_rollback_keeps_the_sizes_of_a_ramp(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = {"train": {"batch_size_ramp": [{"global_batch_size": 2, "until_step": 6}], "micro_batch_size": 1}}
    gradient_becomes(monkeypatch, math.nan, lambda _engine, batch: 9 in batch["sample_ids"])  # in the fifth step
    config = configuration(tmp_path, store, anomaly={"not_finite": "rollback"}, **ramp)
    ran("train", config, ranks=2)
    taken = [record["samples"] for record in records(tmp_path)]
    assert taken == [2, 4, 6, 8, 10, 12, 16, 20, 24, 28, 32, 36]
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/state.json").read_text())["loader"]
    assert (state["jumped"], state["position"]) == ([[8, 10]], 38)


@pytest.mark.distributed
def test_a_run_that_goes_back_again_and_again_ends(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient_becomes(monkeypatch, math.nan, lambda engine, _batch: engine.schedule.steps_taken >= 4)
    config = configuration(tmp_path, store, anomaly={"not_finite": "rollback", "tries": 2})
    said = ran("train", config, code=1)
    assert "went back to the checkpoint of step 4 for the 3. time" in said
    config = configuration(tmp_path, store, anomaly={"not_finite": "skip", "tries": 2})
    said = ran("train", config, code=1)
    assert "it is the 3. in a row" in said


def _judge(**settings: Any) -> tuple[Judge, list[dict[str, Any]]]:
    """A judge of one rank, and what it wrote."""
    events: list[dict[str, Any]] = []
    judge = Judge(
        AnomalyConfig(**{"window_steps": 16, **settings}),
        progress=Progress(total_steps=1, batch_sizes=BatchSizes(1), sequence_length=1),
        position=lambda: 7,
        several=False,
        due=lambda _step: True,
        refused=lambda: None,
        event=lambda _name, **facts: events.append(facts),
    )
    return judge, events


def _accepts(judge: Judge, loss: float | torch.Tensor, norm: float | torch.Tensor) -> bool:
    """Whether the device makes the update; the host has read the step when this returns."""
    refused = judge.refuses(torch.as_tensor(loss), torch.as_tensor(norm))
    judge.ask()
    return not refused


def _ordinary(judge: Judge, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for noise in torch.randn(count, 2, generator=generator, dtype=torch.float64):
        assert _accepts(judge, 4 + 0.1 * noise[0], 1 + 0.1 * noise[1])


def test_spikes_are_judged_by_what_is_usual() -> None:
    judge, events = _judge(loss_spike=Policy.skip, gradient_spike=Policy.rollback)
    assert _accepts(judge, 90.0, 1e9), "nothing is usual yet"
    _ordinary(judge, 40)
    assert not events
    assert not _accepts(judge, 6.0, 1.0)
    assert not judge.ask()
    assert events[-1]["kind"] == "loss_spike"
    assert "usual is" in events[-1]["cause"]
    assert not _accepts(judge, 4.0, 30.0)
    assert judge.ask()
    with pytest.raises(RollBack, match="the gradient norm of step 1 is 30"):
        judge.answer(True)
    assert not judge.ask()
    assert _accepts(judge, 3.0, 0.2), "below is no spike"
    _ordinary(judge, 10)


def test_norms_that_scatter_by_factors_are_not_all_spikes() -> None:
    judge, events = _judge(gradient_spike=Policy.skip, window_steps=128)
    for number in torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist():
        assert _accepts(judge, 4.0, 0.6 * math.exp(0.4 * number))
    assert _accepts(judge, 4.0, 0.0)
    assert not events
    assert not _accepts(judge, 4.0, 60.0)


def test_a_flat_loss_is_not_all_spikes_and_a_resumed_judge_judges_alike() -> None:
    judge, events = _judge(loss_spike=Policy.skip)
    for _ in range(20):
        assert _accepts(judge, 4.0, 1.0)
    assert _accepts(judge, 4.05, 1.0)
    other, _ = _judge(loss_spike=Policy.skip)
    other.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    for it in (judge, other):
        assert not _accepts(it, 6.0, 1.0)
    assert len(events) == 1


def _flip(monkeypatch: pytest.MonkeyPatch, rank: int, step: int, name: str) -> None:
    """Flips one bit of one rank's weight between an update and the ranks' agreement after it."""
    original, engines = Engine.step, []

    def stepped(self: Engine, batch: Any) -> StepResult:
        engines[:] = [self]
        return original(self, batch)

    agreed = Preempt.agreed

    def patched(self: Preempt) -> bool:
        (engine,) = engines
        if engine.schedule.steps_taken == step and int(os.environ.get("RANK", "0")) == rank:
            held = (*engine.parameters, *engine.frozen)
            (local,) = [local for local in held if name in local.shards[0].description.key]
            local.parameter.data.view(-1).view(torch.uint8)[0] ^= 1
        return agreed(self)

    monkeypatch.setattr(Engine, "step", stepped)
    monkeypatch.setattr(Preempt, "agreed", patched)


@pytest.mark.fault(
    number=24,
    fault="one bit of one rank's weight flips: data parallel with ZeRO-1, -2 and without, tensor parallel; "
    "of a weight that is trained, and of one that is frozen",
    holds="found at the next comparison, before a save; the rank is named, by the masters or by the majority, or "
    "all who hold it",
    back_after="stopped, for somebody to look at that machine",
)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "options", "ranks", "told"),
    [
        ({"zero_stage": 1}, [], 2, "rank 1 on"),
        ({"zero_stage": 0}, [], 3, "rank 1 on"),
        ({"zero_stage": 0}, [], 2, "which of them is wrong nobody can say"),
        ({"tensor": 2, "zero_stage": 1}, ["precision=bf16"], 2, "rank 1 on"),
        (
            {"zero_stage": 1},
            ["optimizer.frozen=[embedding]", "precision=bf16"],
            2,
            "which of them is wrong nobody can say",
        ),
        ({"tensor": 2, "zero_stage": 1}, ["optimizer.frozen=[final_norm]"], 4, "rank 1 on"),
    ],
    ids=["zero1", "zero0-three", "zero0-two", "tp2-bf16", "frozen-bf16", "frozen-tp2"],
)
def test_a_flipped_bit_names_its_rank(
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: dict[str, Any],
    options: list[str],
    ranks: int,
    told: str,
) -> None:
    _flip(monkeypatch, rank=1, step=4, name="final_norm" if "tensor" in layout else "embedding")
    config = configuration(
        tmp_path, store, train={"global_batch_size": 6}, parallel=layout, anomaly={"replicas_every_steps": 2},
        checkpoint={"every_steps": 4},
    )  # fmt: skip
    ran("train", config, *options, ranks=ranks, code=1)
    outcome = outcome_of(tmp_path)
    assert "silent corruption at step 4" in outcome.message
    assert told in outcome.message
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
    (event,) = [event for event in RunDirectory(tmp_path / "run").events if event["event"] == "corrupted"]
    assert event["ranks"] == ([1] if event["certain"] else [0, 1])
