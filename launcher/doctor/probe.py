"""Imports modules one after the other and tells of each, in a line of JSON, what came of it; of torch, what it sees.

    python -P -m launcher.doctor.probe torch ray ...

A process of its own: a module that crashes ends this one, and whoever reads knows by the last line which it was.
"""

import contextlib
import importlib
import json
import os
import sys
import warnings
from typing import Any


def tried(name: str) -> dict[str, Any]:
    """What came of importing a module."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return {"module": name, "error": str(error), "missing": name.startswith(str(error.name))}
    except BaseException as error:
        return {"module": name, "error": f"{type(error).__name__}: {error}".splitlines()[0], "missing": False}
    found: dict[str, Any] = {"module": name, "error": None, "missing": False}
    if name == "torch":
        try:
            found["sees"] = seen_by(module)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def seen_by(torch: Any) -> dict[str, Any]:
    """Accelerators and fast paths."""
    cuda = torch.cuda.is_available()
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())] if cuda else []
    free = [torch.cuda.mem_get_info(index)[0] for index in range(len(devices))]
    nccl = cuda and torch.distributed.is_nccl_available()
    return {
        "devices": [
            {"name": device.name, "memory_bytes": device.total_memory, "free_bytes": bytes_free}
            for device, bytes_free in zip(devices, free, strict=True)
        ],
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
        "gloo": torch.distributed.is_gloo_available(),
        "bf16": torch.cuda.is_bf16_supported() if cuda else torch.cpu._is_avx512_bf16_supported(),
        "flash": bool(cuda and torch.backends.cuda.is_flash_attention_available()),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for asked in sys.argv[1:]:
            print(json.dumps(tried(asked)), file=answers, flush=True)
