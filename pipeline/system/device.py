"""Which device is meant, and small arrays from the host to it, without waiting."""

from __future__ import annotations

import contextlib

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return `array` as a tensor on the device; on a GPU the copy is queued, from pinned memory."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def numbered(device: torch.device | str) -> torch.device:
    """Return the device, of GPUs with its number: the current one's, where none is given."""
    found = torch.device(device)
    if found.type != "cuda" or found.index is not None:
        return found
    return torch.device("cuda", torch.cuda.current_device())


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the device is the current one of its kind, as kernels need it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
