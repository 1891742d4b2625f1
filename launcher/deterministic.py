"""`train.deterministic`: what makes the same run compute the same bits each time, on the same machines and layout.

On a CPU a run is bit-identical as it is, and this changes nothing but to hold torch to it. On an accelerator:

- torch takes deterministic kernels, attention's backward pass among them, and raises where there is none;
- cuDNN does not try out algorithms, which may choose another one each time;
- cuBLAS gets a fixed workspace, without which it may split a matrix product otherwise;
- NCCL sums in a ring of one protocol, whatever it finds of the network.

The last two are read from the environment when the first kernel and the first collective start, so `apply` comes before
both; what the user has set there stands.
"""

import os

import torch

ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_PROTO": "Simple"}


def apply(*, deterministic: bool) -> None:
    """Holds this process to one order of additions, if asked; before anything runs on a device."""
    if not deterministic:
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
