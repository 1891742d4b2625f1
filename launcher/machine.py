"""The machine that a run is on, as the planner's arithmetic takes it."""

import torch

from launcher.config import RunConfig
from launcher.plan.hardware import Hardware, load, of_device


def known_machine(config: RunConfig, device: torch.device) -> Hardware | None:
    """`tracking.hardware`, else the file of this accelerator; None where there is none, as for a CPU.

    Raises:
        UserError: the configured one is no hardware.
    """
    if config.tracking.hardware is not None:
        return load(config.tracking.hardware)
    return of_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
