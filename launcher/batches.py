"""The batches that the loop takes, the first of which the ranks compare.

Every rank of a data-parallel slice (its tensor, pipeline and context ranks) reads the same rows by itself, and every
slice rows of its own. Where that fails, because a node has another copy of the store or another version of the code,
training goes on and learns garbage. So once an attempt each rank sends the hash of its first batch, 24 bytes, to all.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loader import Loader
from parallel.common.errors import UserError
from parallel.common.files import hash_bytes
from parallel.topology import Topology


class Batches:
    """A loader's batches."""

    def __init__(self, loader: Loader, topology: Topology) -> None:
        self._loader = loader
        self._topology = topology
        self._compared = False

    def next(self) -> dict[str, Tensor]:
        """This rank's rows of the next global batch.

        Raises:
            UserError: ranks that should have read the same rows did not, or slices share rows; it names the ranks.
        """
        batch = self._loader.next_batch()
        if not self._compared:
            compare(batch, self._topology)
            self._compared = True
        return batch


def compare(batch: Mapping[str, Tensor], topology: Topology) -> None:
    """Every rank calls this with its batch.

    Raises:
        UserError: on all ranks, as `Batches.next` says.
    """
    ids = batch["sample_ids"]
    content = _number(b"".join(batch[name].contiguous().numpy().tobytes() for name in sorted(batch)))
    samples = _number(ids.numpy().tobytes()) if (ids >= 0).any() else 0  # a slice of nothing but fillers has none
    mine = torch.tensor([topology.data_parallel_rank, content, samples], dtype=torch.int64, device=topology.device)
    gathered = [torch.empty_like(mine) for _ in range(topology.world_size)]
    dist.all_gather(gathered, mine)
    slices: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for rank, (place, content, samples) in enumerate(torch.stack(gathered).tolist()):
        slices[place].append((rank, content, samples))
    readers: dict[int, int] = {}
    for place, ranks in sorted(slices.items()):
        first, content, samples = ranks[0]
        others = [str(rank) for rank, theirs, _ in ranks if theirs != content]
        if others:
            raise UserError(
                f"ranks {first} and {', '.join(others)} belong to data-parallel slice {place} but read different rows: "
                "every node needs the same store, the same configuration and the same version of the code"
            )
        if samples and readers.setdefault(samples, first) != first:
            raise UserError(
                f"ranks {readers[samples]} and {first} belong to different data-parallel slices but read the same "
                "samples: every node needs the same version of the code"
            )


def _number(content: bytes) -> int:
    """A hash that fits into an int64, never 0."""
    return int(hash_bytes(content)[:15], 16) + 1
