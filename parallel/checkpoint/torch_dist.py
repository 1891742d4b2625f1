"""Checkpoints that Megatron-LM wrote as `torch_dist`, read tensor by tensor, whatever layout wrote them.

    PATH/latest_checkpointed_iteration.txt                 names the newest
    PATH/iter_0000100/metadata.json  .metadata             what it is; names, shapes and places of tensors
                      __0_0.distcp ...                     tensors; arguments and iteration, which older ones have in
                      common.pt

Layers stand on each other as one tensor with a leading axis; here each has its name with its number, as in
`decoder.layers.3.mlp.linear_fc1.weight`, which it also has where layers differ. Moments are read where they were saved
in the shape of their parameter (Megatron's `fully_reshardable`, or its optimizer that is not distributed).

Nothing is run: `.metadata` goes through our restricted unpickler, arguments through `torch.load`'s weights-only mode,
where their classes stand for inert records. Other objects beside the tensors are never opened.
"""

import io
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.checkpoint.inert import InertRecord, load_inert
from parallel.checkpoint.shards import METADATA, Reader
from parallel.common.errors import UserError
from parallel.updater import Kind

_CLASSES = (
    "argparse.Namespace",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "pathlib.PosixPath",
    "signal.Signals",
    "types.SimpleNamespace",
)
"""What Megatron-LM puts among its arguments; it has about the same list for its own loading."""
_COMMON_FILE, _COMMON_KEY = "common.pt", "common_state/shard_0_1"
_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.(?:state\.(\w+)\.(.+)|.*)")
_KINDS = {"fp32_param": Kind.weight, "exp_avg": Kind.first_moment, "exp_avg_sq": Kind.second_moment}
_STACK = re.compile(r"(decoder\.layers\.)(?!\d)(.+)")
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")


class _Region(dcp.DefaultLoadPlanner):
    """A part of one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        found = self._target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(axis, offset, length)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was read in place."""


class TorchDistFiles:
    """The tensors of a Megatron-LM checkpoint, whole, by the names of its parameters."""

    def __init__(self, path: Path) -> None:
        """Reads descriptions and arguments; no tensor yet.

        Args:
            path: the directory with `latest_checkpointed_iteration.txt`, or one of its iterations.

        Raises:
            UserError: it is no `torch_dist` checkpoint, a file is damaged, or something is not understood.
        """
        self.place = _iteration(path)
        files = {file.name for file in self.place.iterdir() if file.suffix == ".distcp" and not file.is_symlink()}
        self._reader = Reader(self.place, files, objects=True)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored: dict[str, TensorStorageMetadata] = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self.common = self._read_common()
        self._held = self._by_kind()
        self._stacks = {key for key in self._held[Kind.weight] if _STACK.fullmatch(key)}
        everywhere = [set(self._held[kind]) >= set(self._held[Kind.weight]) for kind in Kind]
        self.kinds = tuple(Kind) if all(everywhere) else (Kind.weight,)
        self.steps: int | None = self._steps()

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The arguments of Megatron-LM's command line.

        Raises:
            UserError: the checkpoint has none.
        """
        found = self.common.get("args")
        if not isinstance(found, InertRecord | Namespace):  # the class itself where megatron-core told torch of it
            raise UserError(f"{self.place} has no arguments (`args`): it was not written by Megatron-LM's training.")
        return vars(found)

    @property
    def unread_moments(self) -> list[str]:
        """Tensors of an optimizer that are not in the shape of a parameter."""
        keys = (key for key in self._stored if (found := _OPTIMIZER.fullmatch(key)) and found[1] not in _KINDS)
        return sorted(keys)

    @property
    def names(self) -> set[str]:
        """Of the parameters, layers by their numbers."""
        return {name for key in self._held[Kind.weight] for name in self._unstacked(key)}

    def shape(self, name: str) -> list[int]:
        """Of a parameter."""
        key, layer = self._place(name)
        size = list(self._stored[self._held[Kind.weight][key]].size)
        return size if layer is None else size[1:]

    def read(self, name: str, kind: Kind = Kind.weight) -> Tensor:
        """A whole parameter (the float32 master where there is one), or one of its moments; float32."""
        key, layer = self._place(name)
        stored_key = self._held[kind][key]
        stored = self._stored[stored_key]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(stored_key, stored, [chunk])
        if sum(item.lengths.numel() for item in items) != target.numel():
            raise UserError(f"{self.place / METADATA}: the shards of {stored_key} are not the whole tensor.")
        self._reader.read_data(LoadPlan(items), _Region(target)).wait()
        return (target if layer is None else target[0]).float()

    def _read_common(self) -> dict[str, Any]:
        legacy = self.place / _COMMON_FILE
        if legacy.is_file():
            return load_inert(legacy, _CLASSES)
        where = self._reader.storage_data.get(MetadataIndex(_COMMON_KEY))
        if where is None:
            raise UserError(f"{self.place} has neither {_COMMON_FILE} nor {_COMMON_KEY}: its arguments are missing.")
        path = self.place / where.relative_path
        with path.open("rb") as file:
            file.seek(where.offset)
            return load_inert(path, _CLASSES, stream=io.BytesIO(file.read(where.length)))

    def _by_kind(self) -> dict[Kind, dict[str, str]]:
        """By kind, key of the parameter to key of the tensor; a float32 master goes before the weight."""
        found: dict[Kind, dict[str, str]] = {kind: {} for kind in Kind}
        for key in self._stored:
            optimizer = _OPTIMIZER.fullmatch(key)
            if optimizer is None:
                found[Kind.weight].setdefault(key, key)
            elif optimizer[1] in _KINDS:
                found[_KINDS[optimizer[1]]][optimizer[2]] = key
        return found

    def _steps(self) -> int | None:
        """Steps that the moments stand for: as the optimizer counts them, else iterations."""
        inner = self.common.get("optimizer", {})
        inner = inner.get("optimizer", inner) if isinstance(inner, dict) else {}
        state, groups = inner.get("state", {}), inner.get("param_groups") or [{}]
        counted = state.get("common_step", groups[0].get("step", self.common.get("iteration")))
        return None if counted is None else int(counted)

    def _unstacked(self, key: str) -> list[str]:
        stack = _STACK.fullmatch(key)
        if stack is None:
            return [key]
        return [f"{stack[1]}{layer}.{stack[2]}" for layer in range(self._stored[self._held[Kind.weight][key]].size[0])]

    def _place(self, name: str) -> tuple[str, int | None]:
        """Key of the stored tensor, and the layer in it."""
        layer = _LAYER.fullmatch(name)
        if layer is not None and layer[1] + layer[3] in self._stacks:
            return layer[1] + layer[3], int(layer[2])
        return name, None


def _iteration(path: Path) -> Path:
    latest = path / "latest_checkpointed_iteration.txt"
    if latest.is_file():
        text = latest.read_text().strip()
        if not text.isdigit():
            raise UserError(f"{latest} says {text!r}: expected the number of an iteration.")
        path = path / f"iter_{int(text):07d}"
    described = path / "metadata.json"
    try:
        backend = json.loads(described.read_bytes())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a torch_dist checkpoint: it has no metadata.json and no latest_checkpointed_iteration.txt."
        ) from None
    if backend != "torch_dist":
        raise UserError(f"{described} says the format {backend!r}: the one that is read is torch_dist.")
    return path
