"""The environment of every test: offline, on the CPU unless a GPU is there, one thread a process.

It is set before anything imports torch or DeepSpeed, because both read it once.
"""

import gc
import importlib
import os
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
    _ENVIRONMENT |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}

os.environ.update(_ENVIRONMENT)


def pytest_configure(config: pytest.Config) -> None:
    """Whoever runs tests imports the libraries; not the process that deals them out to workers."""
    if not config.getoption("numprocesses", None) or hasattr(config, "workerinput"):
        importlib.import_module("tests.libraries")


def pytest_collection_finish() -> None:
    """From here on garbage is looked for, but in what the tests make alone."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is `slow` begins first, whichever worker takes it."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
