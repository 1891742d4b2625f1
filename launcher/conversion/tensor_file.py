"""A safetensors file that is written while its tensors are made, one in memory at a time.

The format is a length, a JSON header with each tensor's place, and the tensors' bytes one after the other
(https://huggingface.co/docs/safetensors); the library that reads it can only write what is in memory all at once.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


def write_tensor_file(path: Path, described: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Writes a new file.

    Args:
        path: does not exist.
        described: by name, tensors on the meta device: shape and dtype.
        tensors: the same names in the same order, each as described; asked for one by one.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in described.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, tensor), wanted in zip(tensors, described, strict=True):
            assert name == wanted
            assert (tensor.shape, tensor.dtype) == (described[name].shape, described[name].dtype), name
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
