"""Checkpoints that are as they should be: round trips, other layouts, what stands on the disk, retention."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from launcher.verify.world import run_world
from parallel.checkpoint.manifest import Manifest, whole_steps
from parallel.common.errors import UserError
from tests.parallel.checkpoint_world import Counter, Weights, checkpoints, load, save, saved

pytestmark = pytest.mark.distributed

LAYOUTS = [("tensor", 1), ("tensor", 2), ("rows", 2), ("ragged", 2), ("ragged", 3)]


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS)
def test_any_layout_loads_what_any_other_saved(tmp_path: Path, layout: str, world_size: int) -> None:
    saved(tmp_path, world_size, layout=layout)
    for other, other_size in LAYOUTS:
        assert run_world(lambda wanted=other: load(tmp_path, wanted), other_size) == [1] * other_size


def test_stacked_layers_and_numbers_of_all_kinds_round_trip(tmp_path: Path) -> None:
    kinds = {
        "bf16": torch.tensor([1.5, -0.0, float("inf")]).bfloat16(),
        "int": torch.tensor([2**60, -1]),
        "nan": torch.tensor([float("nan")]),
    }

    class Stack:
        def __init__(self, fill: bool) -> None:
            self.fill = fill

        def state_dict(self) -> dict[str, ShardedTensor]:
            rank, size = dist.get_rank(), dist.get_world_size()
            found = {
                name: ShardedTensor.from_rank_offsets(
                    name, tensor.clone() if self.fill else tensor * 0, replica_id=rank
                )
                for name, tensor in kinds.items()
            }
            layer = torch.full((3,), (rank + 1.0) * self.fill)
            found["mine"] = ShardedTensor.from_rank_offsets("stack", layer, (0, rank, size), prepend_axis_num=1)
            if not self.fill:
                found["mine"].data = None
            return found

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.state = state

    def there_and_back() -> None:
        checkpoints(tmp_path).save(1, {"stack": Stack(True)})
        read = Stack(False)
        checkpoints(tmp_path).load(tmp_path / "step-00000001", {"stack": read})
        assert torch.equal(read.state["mine"], torch.full((3,), dist.get_rank() + 1.0))
        for name, tensor in kinds.items():
            assert read.state[name].dtype == tensor.dtype
            assert torch.equal(read.state[name].view(torch.uint8), tensor.view(torch.uint8)), name

    run_world(there_and_back, 2)


def test_what_stands_on_the_disk(tmp_path: Path) -> None:
    path = saved(tmp_path, 2)
    assert path.name == "step-00000001"
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert files == {"manifest.json", "state.json", "tensors/.metadata", "tensors/__0_0.distcp", "tensors/__1_0.distcp"}
    assert json.loads((path / "state.json").read_text()) == {"progress": {"position": 0.1, "ledger": {"code": 3}}}
    manifest = Manifest.read(path)
    assert manifest.step == 1
    assert manifest.layout == {"ranks": 2}
    assert manifest.participants["progress"] is None
    assert "moments.layer.3" in (manifest.participants["moments"] or ())
    assert set(manifest.files) == files - {"manifest.json"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_a_replicated_tensor_is_written_once(tmp_path: Path) -> None:
    def save_large(replicated: bool) -> None:
        class Large:
            def state_dict(self) -> dict[str, ShardedTensor]:
                replica = dist.get_rank() if replicated else 0
                return {"large": ShardedTensor.from_rank_offsets("large", torch.ones(100_000), replica_id=replica)}

            def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
                raise AssertionError

        checkpoints(tmp_path).save(1, {"large": Large()})

    run_world(save_large, 2, True)
    written = sum(file.stat().st_size for file in (tmp_path / "step-00000001/tensors").iterdir())
    assert 400_000 < written < 410_000


def test_a_part_may_be_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)

    def load_weights() -> bool:
        weights = Weights("tensor")
        checkpoints(tmp_path).load(path, {"weights": weights})
        return torch.equal(weights.local["matrix"], Weights("tensor", seed=1).local["matrix"])

    assert run_world(load_weights, 2) == [True, True]


def test_a_shard_that_nobody_writes_is_an_error(tmp_path: Path) -> None:
    class Half:
        def state_dict(self) -> dict[str, ShardedTensor]:
            return {"half": ShardedTensor.from_rank_offsets("half", torch.ones(4), (0, 0, 2))}

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            raise AssertionError

    with pytest.raises(Exception, match="have 4 elements together"):
        run_world(lambda: checkpoints(tmp_path).save(1, {"half": Half()}), 1)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)

    class Other:
        def __init__(self, **shapes: tuple[int, ...]) -> None:
            self.tensors = {name.replace("_", "."): torch.zeros(shape) for name, shape in shapes.items()}

        def state_dict(self) -> dict[str, ShardedTensor]:
            return {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in self.tensors.items()}

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            raise AssertionError

    fitting = {"weights_matrix": (8, 6), "weights_vector": (5,), "weights_scalar": ()}
    fitting |= {f"weights_layer_{layer}": (3, 2) for layer in range(4)}
    for shapes, message in (
        (fitting | {"weights_bias": (3,)}, r"does not have the tensor weights\.bias, which the weights needs"),
        ({"weights_matrix": (8, 6)}, r"has the tensor weights\.layer\.0 and 5 more, which the weights lacks"),
        (fitting | {"weights_vector": (7,)}, r"weights\.vector has the shape \(5,\) .*, but \(7,\) here"),
    ):
        with pytest.raises(UserError, match=message):
            run_world(lambda wanted=shapes: checkpoints(tmp_path).load(path, {"weights": Other(**wanted)}), 1)
    with pytest.raises(UserError, match="holds no state of average"):
        run_world(lambda: checkpoints(tmp_path).load(path, {"average": Counter()}), 2)


def test_an_existing_step_is_never_written_into(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="exists already"):
        run_world(lambda: save(tmp_path), 2)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_json_states_must_agree(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="progress is not the same on all ranks"):
        run_world(lambda: checkpoints(tmp_path).save(1, {"progress": Counter(dist.get_rank())}), 2)


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    run_world(lambda: save(tmp_path, steps=(1, 2, 3, 10), keep=2), 2)
    assert list(whole_steps(tmp_path)) == [3, 10]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    # A run that went back keeps what it has just saved, however many higher steps there are.
    run_world(lambda: save(tmp_path, steps=(2,), keep=1), 1)
    assert list(whole_steps(tmp_path)) == [2, 10]


def test_leftovers_of_dead_attempts_are_removed_by_the_next_one(tmp_path: Path) -> None:
    for name in (".attempt-dead-00000007", ".removed-step-00000001"):
        (tmp_path / name / "tensors").mkdir(parents=True)
    assert whole_steps(tmp_path) == {}
    assert len(list(tmp_path.iterdir())) == 2, "looking removes nothing"
    saved(tmp_path, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_without_checkpoints_there_is_no_newest(tmp_path: Path) -> None:
    assert whole_steps(tmp_path / "none") == {}
