"""The environment of every test: offline, on the CPU unless a GPU is there, one thread a process.

It is set before anything imports torch or DeepSpeed, because both read it once.
"""

import os
import warnings
from pathlib import Path

import pytest

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    # Forked worlds: a parent that has run OpenMP with several threads hangs its children.
    "OMP_NUM_THREADS": "1",
}
if not Path("/dev/nvidiactl").exists():
    _ENVIRONMENT |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

os.environ.update(_ENVIRONMENT)

# The libraries below us warn of their own deprecations on import; only what runs later is held to account.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import megatron.core.models.hybrid.hybrid_model  # noqa: F401
    from deepspeed.runtime import engine  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is `slow` begins first, whichever worker takes it."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
