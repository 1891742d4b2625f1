"""A checkpoint's tensors one at a time, on one rank: for what converts a model larger than memory.

`StoredTensors` reads global tensors by name, whatever layout wrote them; `write_tensors` writes them while they are
made, one by one. The files are the ones of `shards`.
"""

import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem

from parallel.checkpoint.integrity import check_files
from parallel.checkpoint.manifest import TENSORS, FileRecord, Manifest
from parallel.checkpoint.shards import Reader, SavePlanner, Writer
from parallel.common.errors import UserError

_LARGE_BYTES = 1 << 20


class StoredTensors:
    """The tensors of a step directory, verified before anything is read."""

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """Hashes every file of the step directory `path`, unless only names and shapes are wanted (`verify=False`).

        Raises:
            UserError: the checkpoint is damaged; it names the file.
        """
        manifest = Manifest.read(path)
        if verify:
            check_files(path, manifest)
        inside = {name.removeprefix(f"{TENSORS}/"): record for name, record in manifest.files.items()}
        self._path = path
        self._reader = Reader(path / TENSORS, inside)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Global names (`weight.` and the parameter's, `exp_avg.` and so on) and shapes."""
        stored = self._metadata.state_dict_metadata
        return {key: tensor.size for key, tensor in stored.items() if isinstance(tensor, TensorStorageMetadata)}

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor of this name."""
        stored = self._metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        return stored.properties.dtype

    def read(self, name: str) -> Tensor:
        """One whole tensor, on the CPU.

        Raises:
            UserError: there is none of this name.
        """
        stored = self._metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"{self._path} has no tensor {name}")
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({name: tensor}, self._metadata, is_coordinator=True)
        self._reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
        if tensor.nbytes >= _LARGE_BYTES:
            gc.collect(1)  # torch.load leaves what it has read in cyclic garbage; the young generations cost no time
        return tensor


class _MakingPlanner(SavePlanner):
    """Plans with tensors that have shapes only, and has each made when its turn to be written comes.

    The one before is freed then, whoever still refers to it: `torch.save` leaves it in cyclic garbage, and a model
    larger than memory cannot wait for the collector.
    """

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._make = make
        self._written: Tensor | None = None

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index: MetadataIndex = write_item.index
        if self._written is not None and self._written.untyped_storage().resizable():
            self._written.untyped_storage().resize_(0)
        self._written = self._make(index.fqn)
        return self._written


def write_tensors(
    directory: Path, shapes: Mapping[str, Tensor], make: Callable[[str], Tensor]
) -> dict[str, FileRecord]:
    """Writes whole tensors to `directory`, from a process group of this one rank.

    Args:
        directory: exists and is empty.
        shapes: by global name, tensors on the meta device: shape and dtype.
        make: the tensor of a name; called once for each, in an order of its own. Its memory is this function's.

    Returns:
        The files written, by their names in the directory.
    """
    writer = Writer(directory, one_at_a_time=True)
    dcp.save(dict(shapes), storage_writer=writer, planner=_MakingPlanner(make))
    return writer.recorder.records
