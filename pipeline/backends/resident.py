"""The resident backend: all images decoded once into one uint8 buffer on the device, and cropped there ever after.

For sets that fit: CIFAR, STL, Tiny-ImageNet, ImageNet at reduced size. On a GPU the CPU has nothing left to do; without
one it is the FFCV backend without the decoding.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import torch

from pipeline.backends import Backend, Plan, Wanted
from pipeline.backends.ffcv import FfcvBackend
from pipeline.beton import Beton
from pipeline.cores import available_cores
from pipeline.crop import Ragged, crop_views
from pipeline.errors import InputError
from pipeline.libffcv import RAW
from pipeline.records import WHOLE, damaged, decode_chunk, records_of, whole

SHARE = 0.5
"""Of the free memory that the images may take."""
_CHUNK = 256


def needed(beton: Beton) -> int:
    """Return the bytes all images take."""
    return int((3 * beton.heights.astype(np.int64) * beton.widths).sum())


def free(device: torch.device) -> int:
    """Return the bytes that are free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def fits(beton: Beton, device: torch.device) -> bool:
    """Return whether all images take at most `SHARE` of the free memory."""
    return needed(beton) <= SHARE * free(device)


def decode_all(beton: Beton, workers: int, left_out: frozenset[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return all images, uint8, flat, and each one's first byte, int64 [N].

    Those of `left_out` are not decoded. Raises DamagedRecord, of all damaged ones.
    """
    records, count = records_of(beton), len(beton)
    ends = np.cumsum(3 * beton.heights.astype(np.int64) * beton.widths)
    starts = np.concatenate([[0], ends])
    pixels, ids = np.empty(ends[-1], np.uint8), np.arange(count)
    boxes = whole(records, ids)
    faults: dict[int, int] = {}

    def decode(start: int) -> None:
        stop = min(start + _CHUNK, count)
        for end in [*sorted(index for index in left_out if start <= index < stop), stop]:
            while start < end:  # on to the next that is left out
                fault, at = decode_chunk(records, ids, boxes, starts, start, end, pixels)
                if fault == WHOLE:
                    break
                faults[int(at)] = fault
                start = int(at) + 1
            start = end + 1

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(decode, range(0, count, _CHUNK)))
    if faults:
        first, *others = sorted(faults)
        raise damaged(beton, first, faults[first], tuple(others))
    return pixels, starts[:-1]


class ResidentBackend:
    """See `pipeline.backends.Backend`; on a GPU."""

    def __init__(self, beton: Beton, wanted: Wanted, pixels: np.ndarray, starts: np.ndarray) -> None:
        self.depth, self._sizes, self._widths = wanted.depth, wanted.sizes, beton.widths.astype(np.int64)
        self._starts, self._pixels = starts, torch.from_numpy(pixels).to(wanted.device)
        self._pending: list[Plan] = []

    def submit(self, plan: Plan) -> None:
        self._pending.append(plan)

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        plan = self._pending.pop(0)
        images = Ragged(self._pixels, self._starts[plan.ids], self._widths[plan.ids])
        return crop_views(images, plan, self._sizes)

    def close(self) -> None:
        self._pending.clear()


def build(beton: Beton, wanted: Wanted) -> Backend:
    """Return the backend. Raises InputError where the images take more than `SHARE` of the free memory."""
    device = wanted.device
    if not fits(beton, device):
        raise InputError(
            f"data.backend 'resident': the images of {beton.path} take {needed(beton) / 2**30:.1f} GiB, more than "
            f"{SHARE:.0%} of the {free(device) / 2**30:.1f} GiB free on {device.type}: choose another backend"
        )
    pixels, starts = decode_all(beton, wanted.workers or available_cores(), wanted.left_out)
    if device.type == "cuda":
        return ResidentBackend(beton, wanted, pixels, starts)
    stored = records_of(beton)
    raw = stored._replace(
        data=pixels,
        pointers=starts.astype(stored.pointers.dtype),
        sizes=(3 * beton.heights.astype(np.int64) * beton.widths).astype(stored.sizes.dtype),
        modes=np.full_like(stored.modes, RAW),
        crc32=np.zeros(0, np.uint32),
    )
    return FfcvBackend(beton, wanted, raw)
