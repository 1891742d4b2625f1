"""What a machine can do, as data: a YAML file under configs/hardware or of the user's own. Imports without torch."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from parallel.common.errors import UserError

DIRECTORY = Path(__file__).resolve().parent.parent.parent / "configs" / "hardware"


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """What of its peaks a machine's kernels reach, as shares."""

    matrices: float
    """Of `peak_flops`, in large matrix products."""
    attention: float
    """Of `peak_flops`, in attention."""
    memory: float
    """Of `memory_bytes_per_second`, in operations that only move data."""
    links: float
    """Of both kinds of links, in collectives."""
    output: float = 0.9
    """Of what large products reach, in those of the output layer."""
    cross_entropy: float | None = None
    """Of `memory_bytes_per_second`, in what is done to logits; by default as `memory`."""
    update: float | None = None
    """Of `memory_bytes_per_second`, in the optimizer; by default as `memory`."""
    hidden: float = 0.8
    """Of a pass, that behind which collectives can hide; their kernels take some of the accelerator too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One accelerator and its links; all rates are those of one of them."""

    name: str
    peak_flops: Mapping[str, float]
    """Operations a second of dense matrix products, by precision."""
    memory_bytes: float
    reserved_bytes: float
    """Of the memory, what no tensor can have."""
    memory_bytes_per_second: float
    node_bytes_per_second: float
    """To the others of its node, one way."""
    network_bytes_per_second: float
    """To other nodes, one way."""
    host_bytes_per_second: float
    """To its host's memory, one way."""
    node_latency_seconds: float
    network_latency_seconds: float
    dollars_per_hour: float
    """For one accelerator."""
    efficiency: Efficiency
    narrow_width: float = 160
    """Width of a matrix product at which its rate is half of what wide ones reach."""
    call_seconds: float = 0.0
    """Of an operation, there and back, besides what it does; 0 where that goes on while another one is started."""

    def peak(self, precision: str) -> float:
        """Operations a second in a precision.

        Raises:
            UserError: the file gives none.
        """
        if precision not in self.peak_flops:
            known = ", ".join(self.peak_flops)
            raise UserError(f"{self.name} has no peak_flops for precision {precision}: its file gives {known}.")
        return self.peak_flops[precision]


def names() -> list[str]:
    """The machines that come along."""
    return sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def of_device(name: str) -> Hardware | None:
    """The machine of an accelerator that calls itself `NVIDIA H100 80GB HBM3`; None for one that has no file.

    Cards with the same chip and lower clocks or links (`PCIe`, `NVL`) are other machines.
    """
    words = set(re.split(r"\W+", name.lower()))
    found = next((known for known in names() if known in words), None)
    return None if found is None or words & {"pcie", "nvl"} else load(found)


def load(name: str) -> Hardware:
    """A machine by its name under configs/hardware, or by the path of a file.

    Raises:
        UserError: there is no such machine, or the file is not one; names the key.
    """
    path = DIRECTORY / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise UserError(f"{name} is no known hardware: expected {', '.join(names())} or a YAML file such as theirs.")
    try:
        read = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}.") from error
    return _made(Hardware, read, f"{path}")


def _made(kind: Any, read: Any, where: str) -> Any:
    expected = {field.name: field for field in fields(kind)}
    if not isinstance(read, dict):
        raise UserError(f"{where}: expected the keys {', '.join(expected)}.")
    unknown = sorted(set(map(str, read)) - set(expected))
    missing = [name for name, each in expected.items() if each.default is MISSING and name not in read]
    if unknown or missing:
        said = f"the key {unknown[0]} does not exist" if unknown else f"{missing[0]} is missing"
        raise UserError(f"{where}: {said}: expected the keys {', '.join(expected)}.")
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in read.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if hint is Efficiency:
        return _made(Efficiency, value, where)
    if hint is str:
        return str(value)
    if hint in (float, float | None):
        return _number(value, where)
    if isinstance(value, dict):
        return {str(name): _number(number, f"{where}.{name}") for name, number in value.items()}
    if not isinstance(value, list):
        raise UserError(f"{where} is {value!r}: expected {'a list' if hint == tuple[str, ...] else 'keys below it'}.")
    return tuple(map(str, value))


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)  # YAML reads 3e12 as text
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < float("inf"):
        raise UserError(f"{where} is {value!r}: expected a number above 0.")
    return number
