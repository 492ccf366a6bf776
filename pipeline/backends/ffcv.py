"""The FFCV backend: decodes each JPEG once and crops it once for each view, on the CPU, in compiled code.

It reads FFCV's file format, but not by FFCV's Loader, which cannot serve pretraining: its crops come from numba's
generator, it drops decode errors, has no mid-epoch state, allocates again each epoch and blocks for ever when its
thread dies. Here each chunk of a batch is one call of `_crop_chunk`, which releases the GIL, and the next epoch's
batches follow without a pause.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from pipeline.augment.plan import Plan
from pipeline.augment.resize import Scratch, crop_resize, scratch
from pipeline.backends.threaded import ThreadedBackend
from pipeline.native.numba_cache import compiled
from pipeline.storage.decode import INTACT, JIT, damaged, decode_record, rectangles

Views = tuple[torch.Tensor, ...]


@compiled(**JIT)
def _crop_chunk(
    records: Any,
    ids: Any,
    parts: Any,
    boxes: Any,
    flips: Any,
    start: int,
    stop: int,
    outs: Any,
    pixels: Any,
    buffers: Any,
) -> tuple[int, int]:
    """Fill outs, one [B, S, S, 3] for each view, for samples start..stop.

    parts: int32 [stop - start, 4], as `rectangles` returns. Returns the first fault and its position in `ids`, or
    (INTACT, 0).
    """
    for i in range(start, stop):
        fault, image, top, left, width = decode_record(records, ids[i], parts[i - start], pixels)
        if fault != INTACT:
            return fault, i
        for view in range(len(boxes)):
            box = boxes[view, i]
            inside = (box[0] - top, box[1] - left, np.int64(box[2]), np.int64(box[3]))
            crop_resize(image, width, inside, flips[view, i], outs[view][i], buffers)
    return INTACT, 0


class FfcvBackend(ThreadedBackend[Views]):
    """A backend that decodes and crops on the CPU. A buffer is one flat uint8 tensor for each view."""

    def _new_buffer(self, pinned: bool) -> Views:
        sizes = [3 * self._config.batch * size**2 for size in self._config.sizes]
        return tuple(torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes)

    def _worker_state(self) -> tuple[np.ndarray, Callable[[tuple[int, ...]], Scratch]]:
        """Return a buffer for the largest decoded image, and the scratch memory for crops of given sizes."""
        beton = self._beton
        most_pixels = int((beton.heights.astype(np.int64) * beton.widths).max())
        return np.empty(3 * most_pixels, np.uint8), cache(partial(scratch, longest=beton.longest_side))

    def _fill(self, state: Any, plan: Plan, start: int, stop: int, buffer: Views) -> None:
        pixels, scratch_for = state
        outs, chunk = tuple(view.numpy() for view in _shaped(buffer, plan)), slice(start, stop)
        parts = rectangles(self._records, plan.ids[chunk], plan.boxes[:, chunk])
        samples = self._records, plan.ids, parts, plan.boxes, plan.flips, start, stop
        fault, position = _crop_chunk(*samples, outs, pixels, scratch_for(plan.sizes))
        if fault != INTACT:
            raise damaged(self._beton, int(plan.ids[position]), fault)

    def _crops(self, plan: Plan, buffer: Views, slot: int) -> Views:
        return self._to_device(_shaped(buffer, plan), slot)


def _shaped(buffers: Views, plan: Plan) -> Views:
    """Return the start of each buffer as one view's crops, [B, S, S, 3]."""
    shapes = [(len(plan.ids), size, size, 3) for size in plan.sizes]
    return tuple(flat[: math.prod(shape)].view(shape) for flat, shape in zip(buffers, shapes, strict=True))


build = FfcvBackend
