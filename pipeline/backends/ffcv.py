"""The FFCV backend: JPEG records decoded once and cropped once a view, on the CPU, in compiled code.

FFCV's own Loader cannot give what a pretraining run needs (its crops come from numba's generator, it swallows decode
errors, has no mid-epoch state, allocates anew each epoch and blocks for ever when its thread dies), so this drives
FFCV's file format, compiler and C functions directly. A batch is cut into chunks; each chunk is one call of
`_crop_chunk`, which holds no GIL. Buffers are made once; batches of the next epoch follow those of this one.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from pipeline.backends import Plan
from pipeline.beton import Beton
from pipeline.cores import available_cores
from pipeline.errors import DamagedRecord, LoaderStalled
from pipeline.libffcv import JPEG, crc32, decode_jpeg
from pipeline.resize import crop_resize, scratch
from pipeline.workers import Workers

_CHUNKS = 4  # chunks a worker and batch: small enough to share out evenly, large enough to cost nothing
_WHOLE, _CHANGED, _UNDECODABLE = range(3)
_FAULTS = {
    _CHANGED: "its bytes are not those that were written (CRC32 differs)",
    _UNDECODABLE: "its JPEG does not decode to the stored height and width",
}


class Records(NamedTuple):
    """A beton's records as compiled code takes them."""

    data: np.ndarray
    pointers: np.ndarray
    sizes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    modes: np.ndarray
    crc32: np.ndarray
    """uint32 [n], or [0] where there is no manifest."""


@numba.njit(nogil=True, boundscheck=False)
def jpeg_side_lengths(data: Any) -> tuple[Any, Any]:
    """Return height and width from a JPEG's frame header, (0, 0) where it has none."""
    at = np.int64(2)
    while at + 9 < data.size and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = (np.int64(data[at + 5]) << 8) | np.int64(data[at + 6])
            return height, (np.int64(data[at + 7]) << 8) | np.int64(data[at + 8])
        if marker == 0xFF:  # fill byte
            at += 1
        else:
            at += 2 + ((np.int64(data[at + 2]) << 8) | np.int64(data[at + 3]))
    return 0, 0


@numba.njit(nogil=True, boundscheck=False)
def _decode(records: Any, sample: int, pixels: Any) -> tuple[int, Any]:
    """Return whether the sample is whole, and its pixels: uint8, flat, RGB."""
    start, size = np.int64(records.pointers[sample]), np.int64(records.sizes[sample])
    data = records.data[start : start + size]
    if (
        records.crc32.size > 0
        and np.uint32(crc32(np.uint64(0), data.ctypes.data, np.uint32(size))) != records.crc32[sample]
    ):
        return _CHANGED, pixels
    if records.modes[sample] != JPEG:
        return _WHOLE, data
    height, width = records.heights[sample], records.widths[sample]
    if jpeg_side_lengths(data) != (height, width):
        return _UNDECODABLE, pixels
    status = decode_jpeg(
        data,
        pixels,
        np.uint32(height),
        np.uint32(width),
        np.uint32(height),
        np.uint32(width),
        0,
        0,
        1,
        1,
        False,
        False,
    )
    return (_WHOLE if status == 0 else _UNDECODABLE), pixels


@numba.njit(nogil=True, boundscheck=False)
def _crop_chunk(
    records: Any, ids: Any, boxes: Any, flips: Any, start: int, stop: int, out: Any, pixels: Any, buffers: Any
) -> tuple[int, int]:
    """Fill out [V, B, S, S, 3] for samples start..stop; return the first fault and its place, or (0, 0)."""
    for i in range(start, stop):
        fault, image = _decode(records, ids[i], pixels)
        if fault != _WHOLE:
            return fault, i
        for view in range(len(boxes)):
            crop_resize(image, records.widths[ids[i]], boxes[view, i], flips[view, i], out[view, i], buffers)
    return _WHOLE, 0


def check_record(beton: Beton, index: int) -> str | None:
    """Return what is wrong with sample `index` of `beton`, or None: its CRC32, its JPEG header, its decoding."""
    height, width = int(beton.heights[index]), int(beton.widths[index])
    fault, _ = _decode(_records(beton), index, np.empty(3 * height * width, np.uint8))
    return _FAULTS.get(fault)


def decode(beton: Beton, index: int) -> np.ndarray:
    """Return the pixels of sample `index`: uint8 [H, W, 3]. Raises DamagedRecord."""
    height, width = int(beton.heights[index]), int(beton.widths[index])
    fault, pixels = _decode(_records(beton), index, np.empty(3 * height * width, np.uint8))
    if fault != _WHOLE:
        raise _damaged(beton, index, fault)
    return np.array(pixels).reshape(height, width, 3)


def _records(beton: Beton) -> Records:
    crcs = beton.crc32 if beton.crc32 is not None else np.zeros(0, np.uint32)
    return Records(beton.data, beton.pointers, beton.sizes, beton.heights, beton.widths, beton.modes, crcs)


def _damaged(beton: Beton, sample: int, fault: int) -> DamagedRecord:
    return DamagedRecord(
        f"{beton.path}: sample {sample} ({beton.name(sample)}) is damaged: {_FAULTS[fault]}: list all such "
        f"samples with python -m pipeline.inspect {beton.path} --verify, and write the file again"
    )


class FfcvBackend:
    """See `pipeline.backends.Backend`. On CUDA the views are copied from pinned memory on a stream of their own."""

    def __init__(
        self,
        beton: Beton,
        *,
        size: int,
        views: int,
        batch: int,
        workers: int,
        depth: int,
        device: torch.device,
    ) -> None:
        self.depth = depth
        self._beton, self._records, self._device = beton, _records(beton), device
        pinned = device.type == "cuda"
        self._slots = [
            torch.empty((views, batch, size, size, 3), dtype=torch.uint8, pin_memory=pinned) for _ in range(depth + 1)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._slots)
        self._stream = torch.cuda.Stream(device) if pinned else None
        self._pending: deque[tuple[Plan, torch.Tensor, int, list[Future]]] = deque()
        self._next_slot = 0
        self._count = workers or available_cores()
        most = int((beton.heights.astype(np.int64) * beton.widths).max())
        side = beton.longest_side
        self._workers = Workers(self._count, lambda: (np.empty(3 * most, np.uint8), scratch(size, side)))

    def submit(self, plan: Plan) -> None:
        slot = self._next_slot
        self._next_slot = (slot + 1) % len(self._slots)
        if (copied := self._copied[slot]) is not None:
            copied.synchronize()  # the copy of depth + 1 batches ago: over long since
        out, n = self._slots[slot].numpy(), len(plan.ids)
        chunk = max(1, -(-n // (self._count * _CHUNKS)))
        spans = [(start, min(start + chunk, n)) for start in range(0, n, chunk)]
        futures = [self._workers.submit(self._crop, plan, *span, out) for span in spans]
        self._pending.append((plan, self._slots[slot][:, :n], slot, futures))

    def _crop(self, state: Any, plan: Plan, start: int, stop: int, out: np.ndarray) -> None:
        fault, at = _crop_chunk(self._records, plan.ids, plan.boxes, plan.flips, start, stop, out, *state)
        if fault != _WHOLE:
            raise _damaged(self._beton, int(plan.ids[at]), fault)

    def receive(self, timeout: float) -> torch.Tensor:
        plan, crops, slot, futures = self._pending[0]
        under_way = wait(futures, timeout).not_done
        for future in futures:
            if future not in under_way:
                future.result()  # raises what the worker raised
        if under_way:
            raise LoaderStalled(
                f"{self._beton.path}: no batch for {timeout:g} s (samples {plan.ids[0]} and following): check the disk "
                "or network the file is on, or allow more with --data.stall_timeout"
            )
        self._pending.popleft()
        return crops if self._stream is None else self._copy(crops, slot)

    def _copy(self, crops: torch.Tensor, slot: int) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            views = torch.empty(crops.shape, dtype=torch.uint8, device=self._device)
            for view, crop in zip(views, crops, strict=True):
                view.copy_(crop, non_blocking=True)
            self._copied[slot] = event = torch.cuda.Event()
            event.record()
        torch.cuda.current_stream().wait_event(event)
        views.record_stream(torch.cuda.current_stream())
        return views

    def close(self) -> None:
        self._pending.clear()
        self._workers.close()


build = FfcvBackend
