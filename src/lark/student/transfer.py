"""Copies between the host and a device for which nobody waits."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy to `device`; to a GPU by way of pinned memory."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def copy_to_host(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Begin to copy tensors of one device to the host; returns what waits for the copies and gives them."""
    copies = [x.to("cpu", non_blocking=True) for x in tensors]  # from a GPU into pinned memory
    arrived = torch.cuda.Event() if tensors[0].device.type == "cuda" else None
    if arrived is not None:
        arrived.record()
    elif tensors[0].device.type != "cpu":
        torch.accelerator.synchronize()

    def read() -> list[np.ndarray]:
        if arrived is not None:
            arrived.synchronize()
        return [x.numpy() for x in copies]

    return read
