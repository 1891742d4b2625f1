"""Two attempts at one run: the one that is over commits nothing, whenever the other took the run over."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher.verify.world import run_world
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence, claim
from parallel.checkpoint.manifest import whole_steps
from parallel.checkpoint.retention import Retention
from parallel.common.errors import UserError
from tests.parallel.checkpoint_world import Counter, Weights

pytestmark = pytest.mark.distributed


def _attempt(root: Path, name: str) -> Checkpoints:
    """The checkpoints of an attempt at the run whose token stands in `root/lock`."""
    fence = Fence(attempt=name, holder=(root / "lock").read_text)
    return Checkpoints(root / "checkpoints", retention=Retention(newest=5), fence=fence, layout={}, config={})


def _take_over(root: Path, name: str) -> None:
    """What an attempt does first, on its rank 0."""
    (root / "lock").write_text(name)
    claim(root / "checkpoints", name)


def _state() -> dict[str, Any]:
    return {"weights": Weights("rows", seed=1), "progress": Counter()}


class _Requeued(Counter):
    """A participant in whose time another attempt takes the run over, as one that freezes in a save would see it."""

    def __init__(self, root: Path, *, only_the_token: bool) -> None:
        super().__init__()
        self.root, self.only_the_token = root, only_the_token

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 0:
            if self.only_the_token:
                (self.root / "lock").write_text("second")
            else:
                _take_over(self.root, "second")
        dist.barrier()
        return super().state_dict()


@pytest.mark.parametrize("only_the_token", [True, False], ids=["token", "whole takeover"])
@pytest.mark.fault(
    number=13,
    fault="another attempt takes the run over in the middle of a save",
    holds="the old attempt commits nothing, the new one saves",
    back_after="nothing stops: the other attempt has the run",
)
def test_an_attempt_that_is_over_commits_nothing(tmp_path: Path, only_the_token: bool) -> None:
    """It began to save before the other took over; either the token stops it, or its directory is gone."""

    def first() -> str:
        if dist.get_rank() == 0:
            _take_over(tmp_path, "first")
        dist.barrier()
        checkpoints = _attempt(tmp_path, "first")
        checkpoints.save(1, _state())
        with pytest.raises(UserError) as caught:
            checkpoints.save(2, {**_state(), "requeued": _Requeued(tmp_path, only_the_token=only_the_token)})
        with pytest.raises(UserError, match="belongs to the attempt second now"):
            checkpoints.save(3, _state())
        return str(caught.value)

    messages = run_world(first, 2)
    assert messages[0] == messages[1]
    assert "cannot save the checkpoint" in messages[0]
    if only_the_token:
        assert "the run belongs to the attempt second now, and this is the attempt first, which is over" in messages[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]

    def second() -> list[int]:
        checkpoints = _attempt(tmp_path, "second")
        checkpoints.save(2, _state())
        return list(whole_steps(checkpoints.root))

    assert run_world(second, 2) == [[1, 2]] * 2


def test_a_commit_just_before_the_takeover_counts(tmp_path: Path) -> None:
    def both() -> list[int]:
        _take_over(tmp_path, "first")
        _attempt(tmp_path, "first").save(1, _state())
        _take_over(tmp_path, "second")
        return list(whole_steps(tmp_path / "checkpoints"))

    assert run_world(both, 1) == [[1]]


def test_a_run_without_a_token_is_nobody_s(tmp_path: Path) -> None:
    fence = Fence(attempt="first", holder=lambda: None)
    checkpoints = Checkpoints(tmp_path, retention=Retention(newest=5), fence=fence, layout={}, config={})
    with pytest.raises(UserError, match="no longer says to whom it belongs"):
        run_world(lambda: checkpoints.save(1, _state()), 2)
    assert list(tmp_path.iterdir()) == []
