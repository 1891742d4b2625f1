"""This machine: what computes, what it has room for, and the scheduler. Imports without torch."""

import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.doctor.finding import Finding, Health
from parallel.common.units import format_bytes

_LEAST_FREE_BYTES = 10 << 30
_LEAST_SHARED_BYTES = 1 << 30
_LEAST_MEMORY_BYTES = 4 << 30
_LEAST_FILES = 4096
_OLD_KERNEL = (5, 5)
_SECONDS = 10
DRIVER = Path("/proc/driver/nvidia/version")


def python_and_kernel() -> Iterator[Finding]:
    """What everything runs on."""
    text = (
        f"{platform.python_version()} on {platform.system()} {platform.release()}, {len(os.sched_getaffinity(0))} cores"
    )
    version = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2] if part.isdigit())
    if platform.system() == "Linux" and version < _OLD_KERNEL:
        remedy = "processes with several accelerators were seen to hang before kernel 5.5; upgrade it"
        yield Finding(about="python", text=text, health=Health.note, remedy=remedy)
    else:
        yield Finding(about="python", text=text)


def accelerators(
    sees: Mapping[str, Any] | None, *, driver: Path = Path("/proc/driver/nvidia/version")
) -> Iterator[Finding]:
    """What torch sees; None where torch cannot be imported."""
    if sees is None:
        return
    devices = sees["devices"]
    if devices:
        kinds = {f"{device['name']} with {format_bytes(device['memory_bytes'])}" for device in devices}
        yield Finding(about="accelerators", text=f"{len(devices)} of {', '.join(sorted(kinds))}; CUDA {sees['cuda']}")
        for index, device in enumerate(devices):
            if device["free_bytes"] < 0.9 * device["memory_bytes"]:
                used = format_bytes(device["memory_bytes"] - device["free_bytes"])
                remedy = "somebody else computes there; see nvidia-smi"
                text = f"{used} of accelerator {index} are in use"
                yield Finding(about="accelerators", text=text, health=Health.note, remedy=remedy)
    elif driver.exists():
        text = f"there is a driver, and torch (for CUDA {sees['cuda']}) sees no device"
        remedy = "the driver is older than this CUDA wants, or CUDA_VISIBLE_DEVICES hides them; see nvidia-smi"
        yield Finding(about="accelerators", text=text, health=Health.bad, remedy=remedy)
    else:
        yield Finding(
            about="accelerators", text="none: everything runs on the CPU, over gloo, to develop and to verify"
        )
    yield from _ways_to_talk(sees)
    yield from _fast_paths(sees)


def _ways_to_talk(sees: Mapping[str, Any]) -> Iterator[Finding]:
    if sees["devices"] and sees["nccl"] is None:
        remedy = "install torch's CUDA build"
        yield Finding(about="NCCL", text="not in this torch: no collectives", health=Health.bad, remedy=remedy)
    elif sees["devices"]:
        yield Finding(about="NCCL", text=sees["nccl"])
    if not sees["gloo"]:
        remedy = "install torch from its own wheels"
        yield Finding(about="gloo", text="not in this torch: ranks cannot agree", health=Health.bad, remedy=remedy)


def _fast_paths(sees: Mapping[str, Any]) -> Iterator[Finding]:
    if sees["devices"]:
        flash = "active: attention in linear memory" if sees["flash"] else "not in this torch: slower attention"
        yield Finding(about="flash", text=flash, health=Health.ok if sees["flash"] else Health.note)
    bf16 = "native" if sees["bf16"] else "not native: slower than fp32 here; precision=fp32 is right to develop with"
    yield Finding(about="bf16", text=bf16, health=Health.ok if sees["bf16"] or not sees["devices"] else Health.note)


def room(place: Path) -> Iterator[Finding]:
    """Disk, memory, shared memory, open files."""
    free = shutil.disk_usage(place).free
    text = f"{format_bytes(free)} free in {place}"
    if free < _LEAST_FREE_BYTES:
        remedy = "a checkpoint takes 14 to 18 bytes a parameter; make room, or call from another place"
        yield Finding(about="disk", text=text, health=Health.note, remedy=remedy)
    else:
        yield Finding(about="disk", text=text)
    available = memory_available()
    short = available is not None and available < _LEAST_MEMORY_BYTES
    if available is not None:
        remedy = "something else uses it; ranks may be killed" if short else ""
        health = Health.note if short else Health.ok
        yield Finding(about="memory", text=f"{format_bytes(available)} available", health=health, remedy=remedy)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < _LEAST_SHARED_BYTES:
        text = f"/dev/shm has {format_bytes(shutil.disk_usage(shared).total)} in all"
        remedy = "give the container more (--shm-size=8g, --ipc=host): NCCL and Ray need it"
        yield Finding(about="memory", text=text, health=Health.note, remedy=remedy)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if 0 <= files < _LEAST_FILES:
        text = f"a process may open {files} files"
        yield Finding(about="limits", text=text, health=Health.note, remedy="ulimit -n 65536")


def slurm() -> Iterator[Finding]:
    """Whether jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        text = "no Slurm here: `bloomery train --ranks N` and torchrun work, `bloomery submit` does not"
        yield Finding(about="slurm", text=text)
        return
    try:
        told = subprocess.run(
            ["scontrol", "ping"], capture_output=True, text=True, timeout=_SECONDS, check=False
        ).stdout.strip()
        version = subprocess.run(
            ["sbatch", "--version"], capture_output=True, text=True, timeout=_SECONDS, check=False
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        told = version = ""
    if "UP" in told:
        number = version.split()[-1] if version else "of an unknown version"
        yield Finding(about="slurm", text=f"{number}; {told.splitlines()[0]}")
        return
    text, remedy = "sbatch is here, and no controller answers", "SLURM_CONF may point elsewhere, or munge may not run"
    yield Finding(about="slurm", text=text, health=Health.note, remedy=remedy)


def memory_available() -> int | None:
    """Bytes that processes of this machine could still have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
