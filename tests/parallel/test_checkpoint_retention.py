"""Which checkpoints stay."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.verify.world import run_world
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.manifest import Manifest, whole_manifests, whole_steps
from parallel.checkpoint.retention import Retention, prune
from parallel.config import BestMetric, CheckpointConfig
from tests.parallel.checkpoint_world import Counter

VALIDATION_LOSS = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}


def _write(root: Path, losses: Mapping[int, float | None]) -> None:
    """Step directories with nothing but a manifest: all that retention looks at."""
    for step, loss in losses.items():
        path = root / f"step-{step:08d}"
        path.mkdir(parents=True)
        Manifest(
            step=step,
            attempt="a",
            layout={},
            config={},
            config_fingerprint="",
            versions={},
            metrics={"loss": float(-step)} | ({} if loss is None else {"validation_loss": loss}),
            participants={},
            files={},
        ).write(path)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(newest=1), [6]),
        (Retention(newest=2), [5, 6]),
        (Retention(newest=100), [1, 2, 3, 4, 5, 6]),
        (Retention(newest=1, every_steps=2), [2, 4, 6]),
        (Retention(newest=1, best=1), [2, 6]),
        (Retention(newest=1, best=2), [2, 3, 6]),
        (Retention(newest=1, best=9), [1, 2, 3, 4, 6]),
        (Retention(newest=1, best=1, best_by=BestMetric.loss), [6]),
        (Retention(newest=2, every_steps=4, best=1), [2, 4, 5, 6]),
    ],
)
def test_the_rules_say_what_stays_and_why(tmp_path: Path, retention: Retention, kept: list[int]) -> None:
    _write(tmp_path, {**VALIDATION_LOSS, 5: None, 6: None})
    reasons = retention.reasons(whole_manifests(tmp_path))
    assert [int(path.name[5:]) for path, why in reasons.items() if why] == kept
    assert "newest" in reasons[tmp_path / "step-00000006"]
    removed = prune(tmp_path, retention)
    assert sorted(whole_steps(tmp_path)) == kept
    assert len(removed) == 6 - len(kept)


def test_the_reasons_are_words(tmp_path: Path) -> None:
    _write(tmp_path, VALIDATION_LOSS)
    reasons = Retention(newest=3, every_steps=2, best=1).reasons(whole_manifests(tmp_path))
    assert list(reasons.values()) == [
        [],
        ["newest", "every 2", "best validation_loss 1"],
        ["newest"],
        ["newest", "every 2"],
    ]


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    _write(tmp_path, VALIDATION_LOSS)
    prune(tmp_path, Retention(newest=1), besides=(tmp_path / "step-00000001",))
    assert list(whole_steps(tmp_path)) == [1, 4]


def test_a_step_that_is_not_whole_neither_counts_nor_goes(tmp_path: Path) -> None:
    _write(tmp_path, VALIDATION_LOSS)
    (tmp_path / "step-00000004/manifest.json").write_text("{}")
    prune(tmp_path, Retention(newest=1))
    assert list(whole_steps(tmp_path)) == [3], "the newest whole one, not the newest directory"
    assert (tmp_path / "step-00000004").exists()


def test_the_configuration_names_the_rules() -> None:
    config = CheckpointConfig(keep=4, keep_every_steps=100, keep_best=2, best_by=BestMetric.loss)
    assert Retention.of(config) == Retention(newest=4, every_steps=100, best=2, best_by=BestMetric.loss)


@pytest.mark.distributed
def test_a_run_keeps_its_best(tmp_path: Path) -> None:
    def save() -> None:
        fence = Fence(attempt="a", holder=lambda: "a")
        checkpoints = Checkpoints(
            tmp_path, retention=Retention(newest=1, best=1), fence=fence, layout={}, config={"model": "tiny"}
        )
        for step, loss in VALIDATION_LOSS.items():
            checkpoints.save(step, {"counter": Counter()}, metrics={"validation_loss": loss})

    run_world(save, 2)
    found = whole_manifests(tmp_path)
    assert [manifest.metrics for manifest in found.values()] == [{"validation_loss": 1.0}, {"validation_loss": 2.5}]
    assert [manifest.config for manifest in found.values()] == [{"model": "tiny"}] * 2
