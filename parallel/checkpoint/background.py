"""Saving beside the training loop: one thread that copies to the host's memory, and then writes what it has copied.

Weights and moments change only at the optimizer's update, so the copy runs beside the next forward and backward passes
(torch copies without Python's lock, and on an accelerator on a stream of its own), and training waits for it only
before that update. Its buffers are kept, so that the next copy costs no allocation: as many bytes of host memory as
this rank writes to the disk. The thread agrees with the other ranks' threads over a group of its own.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor


class Background:
    """One piece of work at a time. An error in it waits for whoever asks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Runs `work` in a thread; whatever ran before has been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def failed(self) -> bool:
        """Whether the work has ended with an error that nobody has seen."""
        return self._error is not None

    def wait(self) -> None:
        """Returns when nothing runs any more.

        Raises:
            Exception: what the work raised; once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error


class HostCopy:
    """Copies of shards in memory that is allocated once; pinned where the shards are on an accelerator."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._done = threading.Event()
        self._done.set()
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def begin(self) -> None:
        """From now on `wait` waits: what is to be copied stands as it is, all of it asked of the device."""
        self._done.clear()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Encloses all calls of `of`, in any thread; then nobody waits any more, whether it went well or not."""
        try:
            with torch.cuda.stream(self._stream):
                yield
                if self._stream is not None:
                    self._stream.synchronize()
        finally:
            self._done.set()

    def wait(self) -> None:
        """Returns when nothing is left to be copied."""
        self._done.wait()

    def of(self, tensors: Iterable[ShardedTensor]) -> list[ShardedTensor]:
        """The same shards with copies of their data; of those that other ranks write, only the description."""
        copies: list[ShardedTensor] = []
        for tensor in tensors:
            data = None
            if is_main_replica(tensor.replica_id):
                assert tensor.data is not None
                data = self._buffer(tensor, tensor.data).copy_(tensor.data, non_blocking=True)
            copies.append(replace(tensor, data=data))
        return copies

    def _buffer(self, tensor: ShardedTensor, data: Tensor) -> Tensor:
        key = (tensor.key, tuple(tensor.global_offset))
        found = self._buffers.get(key)
        if found is None or found.shape != data.shape or found.dtype != data.dtype:
            found = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
            self._buffers[key] = found
        return found
