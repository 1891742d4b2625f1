"""Numbers on their way from the device to the host, for whoever can wait until they are there anyway.

Reading a tensor (`item`, `tolist`, `bool`) waits until the device has done all that was asked of it before, and while
the host waits it asks for nothing more: the device runs dry. A copy into pinned memory with an event behind it costs
the host nothing; read after the next passes were queued, it has long arrived.
"""

import torch
from torch import Tensor


class Arrival:
    """Some numbers of a device tensor [n]."""

    def __init__(self, numbers: Tensor) -> None:
        """Begins the copy; the tensor is nobody's to change any more."""
        self._host, self._copied = numbers, None
        if numbers.is_cuda:
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The numbers; waits for what the device had been asked for before the copy, and for nothing after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()
