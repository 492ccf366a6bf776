"""Which backend to take, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from pipeline.backends import resident
from pipeline.beton import Beton

CropOn = Literal["auto", "cpu", "gpu"]


class Choice(NamedTuple):
    """A backend's name among `BACKENDS`, and the reason in a line."""

    name: str
    why: str


def choose(backend: str, crop_on: CropOn, beton: Beton, device: torch.device, processes: int = 1) -> Choice:
    """Return the backend that settings `backend` and `crop_on` mean for this data on this device.

    processes: those that share the machine's memory.
    """
    if backend == "auto" and not beton.in_one_file:
        return Choice("dali", "the images are not in one file, which it alone reads")
    if backend == "auto":
        size = f"the decoded images take {resident.needed(beton) / 2**30:.2f} GiB"
        share = resident.SHARE if device.type == "cuda" else resident.SHARE / processes
        room = f"{share:.0%} of the {resident.free(device) / 2**30:.1f} GiB free on {device.type}"
        if resident.needed(beton) <= share * resident.free(device):
            return Choice("resident", f"{size}, at most {room}")
        backend, why = "ffcv", f"{size}, more than {room}"
    else:
        why = "asked for"
    if backend != "ffcv":
        return Choice(backend, why)
    on_gpu = crop_on == "gpu" or (crop_on == "auto" and device.type == "cuda")
    return Choice("ffcv_gpu" if on_gpu else "ffcv", f"{why}; crops on the {'GPU' if on_gpu else 'CPU'}")
