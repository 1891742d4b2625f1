"""Reading what `torch.save` wrote without running any of it: tensors, plain values, and records that do nothing.

`torch.load` in its weights-only mode refuses every class that it does not know. Those that another program is known to
put beside its tensors are named by the caller and become `InertRecord`s, so that not even their own classes are
imported; any other is an error that names it.
"""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.serialization

from parallel.common.errors import UserError


class InertRecord:
    """Stands for an object: keeps its attributes, or what it was made of (`values`), and does nothing."""

    values: tuple[Any, ...] = ()

    def __init__(self, *values: Any) -> None:
        self.values = values


def load_inert(path: Path, classes: Sequence[str], *, stream: IO[bytes] | None = None) -> dict[str, Any]:
    """A dictionary that `torch.save` wrote, its tensors mapped; `classes` become inert records, any other is refused.

    Args:
        path: the file.
        classes: whole names, as `argparse.Namespace`.
        stream: the part of the file to be read; by default all of it.

    Raises:
        UserError: the file is damaged, or refers to something else; it names it.
    """
    allowed: Any = [(InertRecord, name) for name in classes]
    try:
        with torch.serialization.safe_globals(allowed):
            found = torch.load(stream or path, map_location="cpu", weights_only=True, mmap=stream is None)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it refers to {named[1]}" if named else _briefly(error)
        raise UserError(f"{path} is refused: {what}, which is not what a checkpoint of numbers has.") from None
    except Exception as error:  # garbage raises almost anything
        raise UserError(f"{path} is damaged: it cannot be read ({_briefly(error)}).") from None
    if isinstance(found, list) and len(found) == 1:  # as megatron-core keeps an object
        found = found[0]
    if not isinstance(found, dict):
        raise UserError(f"{path} is refused: it holds a {type(found).__name__}, where a dictionary is expected.")
    return found


def _briefly(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    return next(iter(str(error).splitlines()), type(error).__name__)
