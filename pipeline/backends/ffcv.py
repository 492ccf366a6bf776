"""The FFCV backend: decodes each JPEG once and crops it once for each view, on the CPU, in compiled code.

Where the batch stays on the CPU, the same call augments the crops while they lie in its cache.

It reads FFCV's file format, but not by FFCV's Loader, which cannot serve pretraining: its crops come from numba's
generator, it drops decode errors, has no mid-epoch state, allocates again each epoch and blocks for ever when its
thread dies. Here each chunk of a batch is one call of `_crop_chunk`, which releases the GIL, and the next epoch's
batches follow without a pause.
"""

import math
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from pipeline.augment.cpu_kernels import ColorScratch, augment_into, color_scratch
from pipeline.augment.plan import Plan
from pipeline.augment.resize import Scratch, crop_resize, scratch
from pipeline.backends.base import BackendConfig
from pipeline.backends.threaded import ThreadedBackend
from pipeline.beton import Beton
from pipeline.native.numba_cache import compiled
from pipeline.storage.decode import INTACT, JIT, Records, damaged, decode_record, rectangles

Views = list[torch.Tensor]
_CACHED_BYTES = 1 << 19  # of crops between resizing and augmentation


@compiled(**JIT)
def _crop_chunk(
    records: Any,
    parts: Any,
    boxes: Any,
    flips: Any,
    start: int,
    outs: Any,
    pixels: Any,
    buffers: Any,
) -> tuple[int, int]:
    """Fill outs, one [n, S, S, 3] for each view, with the crops of n records, a batch's samples from `start` on.

    parts: int32 [n, 4], as `rectangles` returns. boxes, flips: of the batch. Returns the first fault and the number of
    its record, or (INTACT, 0).
    """
    for i in range(len(parts)):
        fault, image, top, left, width = decode_record(records, i, parts[i], pixels)
        if fault != INTACT:
            return fault, i
        for view in range(len(boxes)):
            box = boxes[view, start + i]
            inside = (box[0] - top, box[1] - left, np.int64(box[2]), np.int64(box[3]))
            crop_resize(image, width, inside, flips[view, start + i], outs[view][i], buffers)
    return INTACT, 0


class _State:
    """Buffers of one worker."""

    def __init__(self, most_pixels: int, longest_side: int) -> None:
        self.pixels = np.empty(3 * most_pixels, np.uint8)
        """The largest decoded image."""
        self.resize: Callable[[tuple[int, ...]], Scratch] = cache(partial(scratch, longest=longest_side))
        self.color: Callable[[int, int], ColorScratch] = cache(color_scratch)
        self.crops: Callable[[tuple[int, ...]], list[np.ndarray]] = cache(_few_crops)


def _few_crops(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Return room for the crops of as many samples as a core's cache holds, at least one: uint8 [n, S, S, 3] a view."""
    count = max(_CACHED_BYTES // sum(3 * size**2 for size in sizes), 1)
    return [np.empty((count, size, size, 3), np.uint8) for size in sizes]


class _Recycled:
    """Memory for tensors, used again once no tensor refers to it.

    Fresh pages from the system take a third as long as the augmentation that fills them.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, deque[np.ndarray]] = defaultdict(deque)  # by size

    def empty(self, size: int) -> torch.Tensor:
        """Return memory of `size` bytes: uint8, flat."""
        free = self._free[size]
        memory = free.pop() if free else torch.empty(size, dtype=torch.uint8).numpy()
        lease = memory[:]  # the tensor's, and ends with it
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease)


class FfcvBackend(ThreadedBackend[Views]):
    """A backend that decodes and crops on the CPU. A buffer has one flat uint8 tensor for each view.

    For a GPU these are pinned; else each batch takes them with it.
    """

    def __init__(self, beton: Beton, config: BackendConfig, records: Records | None = None) -> None:
        self._memory = _Recycled()
        super().__init__(beton, config, records)

    def _new_buffer(self, pinned: bool) -> Views:
        sizes = self._largest() if pinned else []
        return [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]

    def _largest(self) -> list[int]:
        """Return the number of levels of the largest batch in each view."""
        return [3 * self._config.batch * size**2 for size in self._config.sizes]

    def _prepare(self, plan: Plan, buffer: Views) -> Plan:
        if self._stream is None:
            views = zip(self._largest(), _dtypes(plan), strict=True)
            buffer[:] = [self._memory.empty(size * dtype.itemsize) for size, dtype in views]
        return plan

    def _worker_state(self) -> _State:
        beton = self._beton
        return _State(beton.most_pixels, beton.longest_side)

    def _fill(self, state: _State, plan: Plan, start: int, stop: int, buffer: Views) -> None:
        records = self._records_of(plan.ids[start:stop])
        parts = rectangles(records, plan.boxes[:, start:stop])
        outs = _shaped(buffer, plan)
        if plan.colors is None:
            self._crop(state, plan, records, parts, start, [out.numpy()[start:stop] for out in outs])
            return
        crops = state.crops(plan.sizes)
        for first in range(start, stop, len(crops[0])):
            last = min(first + len(crops[0]), stop)
            part = slice(first - start, last - start)
            self._crop(state, plan, records.take(part), parts[part], first, crops)
            for out, view_crops, color in zip(outs, crops, plan.colors, strict=True):
                augment_into(out, slice(first, last), view_crops, color, state.color(*view_crops.shape[1:3]))

    def _crop(
        self, state: _State, plan: Plan, records: Records, parts: np.ndarray, start: int, outs: Sequence[np.ndarray]
    ) -> None:
        """Fill outs with the crops of `records`, samples from `start` on, of which `parts` are decoded.

        Raises DamagedRecord.
        """
        samples = records, parts, plan.boxes, plan.flips, start
        fault, position = _crop_chunk(*samples, tuple(outs), state.pixels, state.resize(plan.sizes))
        if fault != INTACT:
            raise damaged(self._beton, int(plan.ids[start + position]), fault)

    def _crops(self, plan: Plan, buffer: Views, slot: int) -> tuple[torch.Tensor, ...]:
        outs = self._to_device(_shaped(buffer, plan), slot)
        return outs if plan.colors is None else tuple(out.permute(0, 3, 1, 2) for out in outs)


def _dtypes(plan: Plan) -> list[torch.dtype]:
    return [torch.uint8 for _ in plan.sizes] if plan.colors is None else [color.dtype for color in plan.colors]


def _shaped(buffer: Views, plan: Plan) -> Views:
    """Return the start of each tensor as one view's crops, or views, [B, S, S, 3]."""
    levels = [flat.view(dtype) for flat, dtype in zip(buffer, _dtypes(plan), strict=True)]
    shapes = [(len(plan.ids), size, size, 3) for size in plan.sizes]
    return [flat[: math.prod(shape)].view(shape) for flat, shape in zip(levels, shapes, strict=True)]


build = FfcvBackend
