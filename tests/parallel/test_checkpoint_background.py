"""Saving while training goes on: what is written is what was, and no error is lost."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from launcher.verify.world import run_world
from parallel.checkpoint.background import HostCopy
from parallel.checkpoint.checkpoints import Checkpoints
from parallel.checkpoint.fence import Fence
from parallel.checkpoint.manifest import whole_steps
from parallel.checkpoint.patience import Patience
from parallel.checkpoint.retention import Retention
from parallel.common.errors import SystemFailure, UserError
from tests.parallel.checkpoint_world import Counter, Weights, load, save

pytestmark = pytest.mark.distributed


def _state(step: int) -> dict[str, Any]:
    return {
        "weights": Weights("tensor", seed=step),
        "moments": Weights("tensor", "moments", seed=-step),
        "progress": Counter(step / 10),
    }


def _checkpoints(root: Path, holder: Callable[[], str], *, failures: int = 0) -> Checkpoints:
    return Checkpoints(
        root,
        retention=Retention(newest=9),
        fence=Fence(attempt="a", holder=holder),
        layout={},
        config={},
        group=cast(dist.ProcessGroup, dist.new_group(backend="gloo")),
        asynchronous=True,
        patience=Patience(failures),
    )


class _Gate:
    """Holds the commit of a save in the background back: the run's token is read in the thread only then."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.answer: Callable[[], str] = lambda: "a"

    def __call__(self) -> str:
        if threading.current_thread() is threading.main_thread():
            return "a"
        assert self.open.wait(30)
        return self.answer()


def test_what_is_written_is_what_was_when_the_save_began(tmp_path: Path) -> None:
    def work() -> list[str]:
        gate, told = _Gate(), []
        checkpoints = _checkpoints(tmp_path, gate)
        state = _state(1)
        checkpoints.save(1, state, committed=lambda **facts: told.append(facts["checkpoint"]))
        assert not whole_steps(tmp_path), "the save has returned, the commit has not come"
        checkpoints.copied()
        for name in ("weights", "moments"):  # training goes on, collectives and all
            for tensor in state[name].local.values():
                tensor.add_(1)
                dist.all_reduce(tensor)
        state["progress"].value = 99
        assert not checkpoints.ask()
        gate.open.set()
        checkpoints.wait()
        assert list(whole_steps(tmp_path)) == [1]
        return told

    assert run_world(work, 2) == [["step-00000001"], []], "rank 0 is told"
    assert run_world(lambda: load(tmp_path), 1) == [1]


def test_one_is_in_flight_at_most_and_buffers_are_used_again(tmp_path: Path) -> None:
    run_world(lambda: save(tmp_path, steps=(1, 2, 3), asynchronous=True), 2)
    assert list(whole_steps(tmp_path)) == [1, 2, 3]
    for step, path in whole_steps(tmp_path).items():
        assert run_world(lambda path=path: load(tmp_path, path=path), 2) == [step, step]


@pytest.mark.parametrize("error", [MemoryError("no room for a copy"), OSError(12, "Cannot allocate memory")])
def test_a_copy_that_fails_holds_nobody_up_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """On one rank alone; the other learns of it."""

    def work() -> str:
        def fails(copy: HostCopy, tensors: Any) -> Any:
            raise error

        checkpoints = _checkpoints(tmp_path, lambda: "a")
        if dist.get_rank() == 1:
            monkeypatch.setattr(HostCopy, "of", fails)
        checkpoints.save(1, _state(1))
        checkpoints.copied()
        with pytest.raises((UserError, MemoryError, RuntimeError)) as caught:
            _answer(checkpoints)
        return str(caught.value)

    for told in run_world(work, 2):
        assert error.args[-1] in told
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"


def _answer(checkpoints: Checkpoints) -> None:
    """As the loop does after each step."""
    while True:
        failed = [False, False]
        dist.all_gather_object(failed, checkpoints.ask())
        checkpoints.answer(any(failed))


@pytest.mark.parametrize("asked", [_answer, lambda it: it.save(2, _state(2)), Checkpoints.wait])
def test_an_error_in_the_background_is_raised_by_whatever_comes_next(
    tmp_path: Path, asked: Callable[[Checkpoints], None]
) -> None:
    def full() -> str:
        raise OSError(28, "No space left on device", str(tmp_path))

    def work() -> str:
        gate = _Gate()
        gate.answer = full
        gate.open.set()
        checkpoints = _checkpoints(tmp_path, gate)
        checkpoints.save(1, _state(1))
        with pytest.raises(UserError) as caught:
            asked(checkpoints)
        checkpoints.wait()  # it is told once
        checkpoints.close()
        return str(caught.value)

    told = f"cannot save the checkpoint {tmp_path}/step-00000001: No space left on device ({tmp_path})"
    assert run_world(work, 2) == [told, told]
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"


def test_saves_may_fail_for_a_while(tmp_path: Path) -> None:
    def work() -> list[str]:
        full = iter((True, False, True, True, True))

        def holder() -> str:
            if threading.current_thread() is not threading.main_thread() and next(full):
                raise OSError(28, "No space left on device", str(tmp_path))
            return "a"

        checkpoints = _checkpoints(tmp_path, holder, failures=2)
        for step in (1, 2, 3, 4):
            checkpoints.save(step, _state(step))
        caught = []
        for told in (
            lambda: checkpoints.finish(mirror=False),
            lambda: checkpoints.save(5, _state(5)),
            checkpoints.wait,
        ):
            try:
                told()
            except SystemFailure as error:
                caught.append(str(error))
        return caught

    told = [f"cannot save the checkpoint {tmp_path}/step-0000000{step}: No space left on device" for step in (4, 5)]
    for said in run_world(work, 2):
        assert [each.removesuffix(f" ({tmp_path})") for each in said] == told
    assert list(whole_steps(tmp_path)) == [2]
    assert run_world(lambda: load(tmp_path, path=tmp_path / "step-00000002"), 1) == [2]


def test_closing_lets_a_save_end_and_hides_no_other_error(tmp_path: Path) -> None:
    def work() -> None:
        gate = _Gate()
        checkpoints = _checkpoints(tmp_path, gate)
        checkpoints.save(1, _state(1))
        threading.Timer(0.2, gate.open.set).start()
        try:
            raise FloatingPointError("step 2")
        finally:
            checkpoints.close()

    with pytest.raises(FloatingPointError):
        run_world(work, 2)
    assert list(whole_steps(tmp_path)) == [1]


def test_a_process_that_ends_in_a_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    def work() -> None:
        _checkpoints(tmp_path, _Gate()).save(1, _state(1))
        dist.barrier()
        os._exit(0)

    with pytest.raises(Exception, match="rank 0 ended with status 0"):
        run_world(work, 2)
    assert whole_steps(tmp_path) == {}
