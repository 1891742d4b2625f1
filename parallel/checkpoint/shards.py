"""Sharded tensors on the disk: torch DCP's format, with megatron-core's sharding, hashed while written.

Writing goes through DCP's own synchronous file writer, one file a rank: megatron-core's writer starts a process
manager by spawn, which hangs a run without a `__main__` guard. A file system that hashes what passes through it makes
the manifest's hashes cost nothing worth measuring (xxh3: 14 GB/s), so zip's CRC-32 is left out.

Reading runs no code from the files. DCP's `.metadata` is a pickle: it is read by an unpickler that knows DCP's
metadata classes and nothing else, and must then describe only tensors in files that the manifest lists. The tensors
themselves are read by `torch.load` in its weights-only mode.
"""

import io
import math
import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.filesystem as dcp_filesystem
import torch.distributed.checkpoint.metadata as dcp_metadata
import torch.serialization
import xxhash
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies.torch import mcore_to_pyt_state_dict
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from parallel.checkpoint.manifest import DamagedCheckpoint, FileRecord
from parallel.common.errors import UserError
from parallel.common.faults import fault_point
from parallel.common.files import start_flush

METADATA = ".metadata"
_FLUSH_BYTES = 1 << 25
"""Written between two hints to the disk."""
_AHEAD_BYTES = 10_000_000
"""Copied from an accelerator while others are written: DCP's own default."""

_METADATA_CLASSES = {
    (module.__name__, name)
    for module, names in {
        dcp_metadata: (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        dcp_filesystem: ("_StorageInfo",),
        torch.serialization: ("_get_layout",),
        torch: ("Size",),
    }.items()
    for name in names
}


_OBJECTS = {(dcp_metadata.__name__, "BytesStorageMetadata")}
"""An empty class that stands for objects beside the tensors: none of ours, and never read."""


class _HashingFile:
    """A file open for writing that hashes what is written to it, front to back, and has the disk keep up."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._bytes = self._flushed = 0
        self.digest = xxhash.xxh3_128()
        self.tell, self.fileno, self.flush, self.close = file.tell, file.fileno, file.flush, file.close

    def write(self, content: bytes | memoryview) -> int:
        self.digest.update(content)
        written = self._file.write(content)
        self._bytes += written
        if self._bytes - self._flushed >= _FLUSH_BYTES:
            start_flush(self._file.fileno(), self._flushed, self._bytes - self._flushed)
            self._flushed = self._bytes
        fault_point("checkpoint.shard_half_written")
        return written


class _HashingFileSystem(dcp_filesystem.FileSystem):
    """DCP's file system, with a record of each file written."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with Path(path).open("xb") as file:
            stream = _HashingFile(file)
            try:
                yield stream
            except RuntimeError as error:  # what torch.save makes of a write that failed
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        self.records[Path(path).name] = FileRecord(bytes=Path(path).stat().st_size, hash=stream.digest.hexdigest())

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class Writer(dcp.FileSystemWriter):
    """DCP's writer: hashing, no file for a rank with nothing to write, no paths in the metadata, nothing left out."""

    def __init__(self, directory: Path, *, one_at_a_time: bool = False) -> None:
        """Writes to a directory; with `one_at_a_time` no tensor is asked for before the one before is written."""
        super().__init__(
            directory,
            single_file_per_rank=True,
            sync_files=True,
            thread_count=1,
            per_thread_copy_ahead=0 if one_at_a_time else _AHEAD_BYTES,
            overwrite=False,
        )
        self.fs = self.recorder = _HashingFileSystem()

    def write_data(self, plan: SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        if plan.items:
            before = torch.serialization.get_crc32_options()
            torch.serialization.set_crc32_options(False)
            try:
                return super().write_data(plan, planner)
            finally:
                torch.serialization.set_crc32_options(before)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for key, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), key
            written = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if written != math.prod(tensor.size):
                raise RuntimeError(f"{key} {tuple(tensor.size)}: the ranks' shards have {written} elements together")
        super().finish(metadata, results)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class SavePlanner(dcp.DefaultSavePlanner):
    """DCP's planner, without empty shards and without a copy of what is a part of a larger memory."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        return replace(plan, items=[item for item in plan.items if _elements(item)])

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        data = super().resolve_data(write_item)
        return alone(data.detach()) if isinstance(data, Tensor) else data


def alone(tensor: Tensor) -> Tensor:
    """The same memory as a tensor with a storage of its own size, which `torch.save` needs not to write more.

    What ZeRO shards are pieces of flat buffers; DCP clones those, and the clones lie in `torch.save`'s cyclic garbage:
    up to the whole checkpoint once more.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    flat = torch.from_numpy(tensor.view(-1).view(torch.uint8).numpy())
    return flat.view(tensor.dtype).view(tensor.shape)


def _elements(item: WriteItem) -> int:
    assert item.tensor_data
    return math.prod(item.tensor_data.chunk.sizes)


def write_shards(
    directory: Path, tensors: Iterable[ShardedTensor], group: ProcessGroup | None = None
) -> dict[str, FileRecord]:
    """Writes the ranks' shards to `directory`, each replicated shard once; every rank of the group calls this.

    Returns:
        The files that this rank wrote, by their names in the directory.

    Raises:
        CheckpointException: on all ranks, when any rank failed.
    """
    main = [tensor for tensor in tensors if is_main_replica(tensor.replica_id)]
    assert all(tensor.data is not None for tensor in main)
    writer = Writer(directory)
    planner = SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(mcore_to_pyt_state_dict(_by_key(main)), storage_writer=writer, planner=planner, process_group=group)
    return writer.recorder.records


def read_shards(directory: Path, tensors: Iterable[ShardedTensor], files: Mapping[str, FileRecord]) -> None:
    """Fills this rank's shards from `directory`, whatever sharding wrote it; ranks read by themselves.

    Args:
        directory: the directory that `write_shards` filled.
        tensors: templates; each one's `data` is filled in place, or allocated if it is None.
        files: what the manifest says that the directory holds.

    Raises:
        DamagedCheckpoint: a file is not what `write_shards` writes, or a tensor is missing.
        UserError: a tensor has another shape.
    """
    wanted = _by_key([tensor for tensor in tensors if math.prod(tensor.local_shape)])
    reader = Reader(directory, files)
    metadata = reader.read_metadata()
    for key, shards in wanted.items():
        stored = metadata.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise DamagedCheckpoint(f"{directory} has no tensor {key}")
        if tuple(stored.size) != tuple(shards[0].global_shape):
            raise UserError(
                f"{key} has the shape {tuple(stored.size)} in {directory}, but {tuple(shards[0].global_shape)} here"
            )
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(wanted, is_loading=True), metadata, is_coordinator=False)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()


def _by_key(tensors: Iterable[ShardedTensor]) -> dict[str, list[Any]]:
    """Shards by the name of their global tensor, as megatron-core's translation wants them.

    A layer of a stack gets its leading axes of length one as real ones (views of the same memory); otherwise
    megatron-core would go through torch's deprecated ShardedTensor.
    """
    grouped: dict[str, list[Any]] = {}
    for tensor in tensors:
        if tensor.data is None:
            tensor.init_data("cpu")
        assert tensor.data is not None
        shape = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
        data = tensor.data[(None,) * tensor.prepend_axis_num]
        whole = replace(tensor, data=data, local_shape=shape, prepend_axis_num=0)
        grouped.setdefault(tensor.key, []).append(whole)
    return grouped


class _MetadataUnpickler(pickle.Unpickler):
    """Knows DCP's metadata classes and torch's dtypes; anything else is refused before it is looked up."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _METADATA_CLASSES | _OBJECTS:
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}")


class Reader(dcp.FileSystemReader):
    """DCP's reader, which trusts nothing that it reads."""

    def __init__(self, directory: Path, files: Collection[str], *, objects: bool = False) -> None:
        """Knows the directory, the names of its files, and whether there may be objects beside the tensors."""
        super().__init__(directory)
        self.directory = directory
        self.files = files
        self.kinds = (TensorStorageMetadata, dcp_metadata.BytesStorageMetadata)[: 1 + objects]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.directory / METADATA
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            self._check(metadata)
        except Exception as error:  # a pickle of garbage raises almost anything
            raise DamagedCheckpoint(f"{path} is refused: it is not the metadata of tensors ({error})") from None
        return metadata

    def _check(self, metadata: Any) -> None:
        if type(metadata) is not Metadata:
            raise ValueError("no metadata object")
        for key, tensor in metadata.state_dict_metadata.items():
            if type(key) is not str or type(tensor) not in self.kinds:
                raise ValueError(f"{key!r} is not a tensor")
        for index, place in metadata.storage_data.items():
            if type(index) is not dcp_metadata.MetadataIndex or type(place) is not dcp_filesystem._StorageInfo:
                raise ValueError(f"{index!r} is not a place in a file")
            if place.relative_path not in self.files or place.transform_descriptors:
                raise ValueError(f"{place.relative_path!r} is not a file of this checkpoint")

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            try:
                super().read_data(replace(plan, items=items), planner).wait()
            except Exception as error:
                path = self.directory / name
                raise DamagedCheckpoint(f"{path} is refused: its tensors cannot be read ({error})") from None
        done: Future[None] = Future()
        done.set_result(cast(None, None))
        return done
