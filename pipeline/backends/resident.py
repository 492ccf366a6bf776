"""The resident backend: all images decoded once into one uint8 buffer on the device, and cropped there ever after.

For sets that fit: CIFAR, STL, Tiny-ImageNet, ImageNet at reduced size. On a GPU the CPU has nothing left to do; without
one it is the FFCV backend without the decoding.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.plan import Plan
from pipeline.backends.base import Backend, Wanted
from pipeline.backends.ffcv import FfcvBackend
from pipeline.beton import Beton
from pipeline.native.libffcv import RAW
from pipeline.storage.decode import WHOLE, damaged, decode_chunk, records_of, whole
from pipeline.system.cores import available_cores, free_memory
from pipeline.system.errors import InputError

SHARE = 0.5
"""Of the free memory that the images may take for `auto` to choose this backend, before there is a model."""
MOST = 0.8
"""Of the free memory that they may take when they are decoded: more is refused."""
_CHUNK = 64  # samples a task
_BLOCK = 1 << 28  # bytes that are decoded, then copied to the device


def needed(beton: Beton) -> int:
    """Return the bytes all images take."""
    return int(_bytes(beton).sum())


def free(device: torch.device) -> int:
    """Return the bytes that are free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() or 0


def fits(beton: Beton, device: torch.device) -> bool:
    """Return whether all images take at most `MOST` of the free memory."""
    return needed(beton) <= MOST * free(device)


def decode_all(beton: Beton, wanted: Wanted) -> tuple[torch.Tensor, np.ndarray]:
    """Return all images on the device, uint8, flat, and each one's first byte, int64 [N].

    They pass through two buffers of the host, a block at a time. Those of `left_out` are not decoded. Raises
    DamagedRecord, of all damaged ones.
    """
    starts = np.concatenate([[0], np.cumsum(_bytes(beton))])
    blocks, decoding = _blocks(starts), _Decoding(beton, starts, sorted(wanted.left_out))
    out = torch.empty(int(starts[-1]), dtype=torch.uint8, device=wanted.device)
    on_gpu = wanted.device.type == "cuda"
    most = max(int(starts[end] - starts[first]) for first, end in blocks)
    staging = [torch.empty(most, dtype=torch.uint8, pin_memory=True) for _ in range(2)] if on_gpu else []
    copied: list[Any] = [None, None]
    with ThreadPoolExecutor(wanted.workers or available_cores()) as pool:
        for number, (first, end) in enumerate(blocks):
            to, slot = out[int(starts[first]) : int(starts[end])], number % 2
            if copied[slot] is not None:
                copied[slot].synchronize()
            into = staging[slot] if on_gpu else to
            spans = [(at, min(at + _CHUNK, end)) for at in range(first, end, _CHUNK)]
            for done in [pool.submit(decoding.decode, *span, into, first) for span in spans]:
                done.result()
            if on_gpu:
                to.copy_(into[: len(to)], non_blocking=True)
                copied[slot] = torch.cuda.Event()
                copied[slot].record(torch.cuda.current_stream(wanted.device))
    if on_gpu:
        torch.cuda.synchronize(wanted.device)
    if decoding.faults:
        at, *others = sorted(decoding.faults)
        raise damaged(beton, at, decoding.faults[at], tuple(others))
    return out, starts[:-1]


class _Decoding:
    """Decodes runs of samples, one after another in memory, in several threads; keeps count of what is damaged."""

    def __init__(self, beton: Beton, starts: np.ndarray, left_out: list[int]) -> None:
        self._records, self._ids, self._starts, self._left_out = (
            records_of(beton),
            np.arange(len(beton)),
            starts,
            left_out,
        )
        self._boxes = whole(self._records, self._ids)
        self.faults: dict[int, int] = {}
        """By sample."""

    def decode(self, first: int, end: int, to: torch.Tensor, base: int) -> None:
        """Decode samples first..end to where they belong in `to`, which begins with sample `base`."""
        for stop in [*(index for index in self._left_out if first <= index < end), end]:
            while first < stop:  # on to the next that is left out
                places = self._starts[first : stop + 1] - self._starts[base]
                given = self._records, self._ids[first:stop], self._boxes[first:stop], places
                fault, at = decode_chunk(*given, 0, stop - first, to.numpy())
                if fault == WHOLE:
                    break
                self.faults[first + int(at)] = fault
                first += int(at) + 1
            first = stop + 1


def _blocks(starts: np.ndarray) -> list[tuple[int, int]]:
    """Return first and end of runs of samples of at most `_BLOCK` bytes, or of one sample."""
    blocks, first = [], 0
    while first < len(starts) - 1:
        end = max(int(np.searchsorted(starts, starts[first] + _BLOCK, "right")) - 1, first + 1)
        blocks.append((first, end))
        first = end
    return blocks


def _bytes(beton: Beton) -> np.ndarray:
    return 3 * beton.heights.astype(np.int64) * beton.widths


class ResidentBackend:
    """See `pipeline.backends.Backend`; on a GPU."""

    def __init__(self, beton: Beton, wanted: Wanted, pixels: torch.Tensor, starts: np.ndarray) -> None:
        self.depth, self._widths = wanted.depth, beton.widths.astype(np.int64)
        self._starts, self._pixels = starts, pixels
        self._pending: list[Plan] = []

    def submit(self, plan: Plan) -> None:
        self._pending.append(plan)

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        plan = self._pending.pop(0)
        images = Ragged(self._pixels, self._starts[plan.ids], self._widths[plan.ids])
        return crop_views(images, plan)

    def ready(self) -> bool:
        return bool(self._pending)

    def forget(self) -> bool:
        self._pending.clear()
        return True

    def close(self) -> None:
        self._pending.clear()
        self._pixels = self._pixels[:0].clone()  # gives the memory back


def build(beton: Beton, wanted: Wanted) -> Backend:
    """Return the backend. Raises InputError where the images take more than `MOST` of the free memory."""
    device = wanted.device
    if not fits(beton, device):
        raise InputError(
            f"data.backend 'resident': the images of {beton.path} take {needed(beton) / 2**30:.1f} GiB, more than "
            f"{MOST:.0%} of the {free(device) / 2**30:.1f} GiB free on {device.type}: choose another backend"
        )
    pixels, starts = decode_all(beton, wanted)
    if device.type == "cuda":
        return ResidentBackend(beton, wanted, pixels, starts)
    stored = records_of(beton)
    raw = stored._replace(
        data=pixels.numpy(),
        pointers=starts.astype(stored.pointers.dtype),
        sizes=_bytes(beton).astype(stored.sizes.dtype),
        modes=np.full_like(stored.modes, RAW),
        crc32=np.zeros(0, np.uint32),
    )
    return FfcvBackend(beton, wanted, raw)
