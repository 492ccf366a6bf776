"""Devices by number, and small arrays copied to them without waiting."""

import contextlib

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return `array` as a tensor on the device; on a GPU the copy is queued, from pinned memory."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def numbered(device: torch.device | str) -> torch.device:
    """Return the device, with the current GPU's number where a GPU has none."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which a GPU is the current one, as kernels need it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
