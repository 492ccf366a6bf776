"""The FFCV backend: JPEG records decoded once and cropped once a view, on the CPU, in compiled code.

FFCV's own Loader cannot give what a pretraining run needs (its crops come from numba's generator, it swallows decode
errors, has no mid-epoch state, allocates anew each epoch and blocks for ever when its thread dies), so this drives
FFCV's file format, compiler and C functions directly. A batch is cut into chunks; each chunk is one call of
`_crop_chunk`, which holds no GIL. Buffers are made once; batches of the next epoch follow those of this one.
"""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from pipeline.augment.plan import Plan
from pipeline.augment.resize import crop_resize, scratch
from pipeline.backends.base import Wanted
from pipeline.backends.threaded import Ahead
from pipeline.beton import Beton
from pipeline.native.numba_cache import compiled
from pipeline.storage.decode import JIT, WHOLE, Records, damaged, decode_record, records_of, rectangles

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
    """Fill outs, [B, S, S, 3] a view, for samples start..stop; return the first fault and its place, or (0, 0).

    parts: int32 [stop - start, 4], of `rectangles`.
    """
    for i in range(start, stop):
        fault, image, top, left, width = decode_record(records, ids[i], parts[i - start], pixels)
        if fault != WHOLE:
            return fault, i
        for view in range(len(boxes)):
            box = boxes[view, i]
            inside = (box[0] - top, box[1] - left, np.int64(box[2]), np.int64(box[3]))
            crop_resize(image, width, inside, flips[view, i], outs[view][i], buffers)
    return WHOLE, 0


class FfcvBackend:
    """See `pipeline.backends.Backend`. records: others than the beton's own."""

    def __init__(self, beton: Beton, wanted: Wanted, records: Records | None = None) -> None:
        self.depth = wanted.depth
        self._beton, self._records = beton, records or records_of(beton)
        most = int((beton.heights.astype(np.int64) * beton.widths).max())

        def buffer(pinned: bool) -> Views:
            most_bytes = [3 * wanted.batch * size**2 for size in wanted.sizes]
            return tuple(torch.empty(bytes_, dtype=torch.uint8, pin_memory=pinned) for bytes_ in most_bytes)

        def state() -> tuple[np.ndarray, Any]:
            return np.empty(3 * most, np.uint8), cache(partial(scratch, longest=beton.longest_side))

        self._ahead = Ahead(beton, wanted, self._crop, state=state, buffer=buffer)

    def submit(self, plan: Plan) -> None:
        self._ahead.begin(plan)

    def _crop(self, state: Any, plan: Plan, start: int, stop: int, views: Views) -> None:
        pixels, scratch_of = state
        outs, chunk = tuple(view.numpy() for view in _shaped(views, plan)), slice(start, stop)
        parts = rectangles(self._records, plan.ids[chunk], plan.boxes[:, chunk])
        drawn = plan.boxes, plan.flips
        fault, at = _crop_chunk(
            self._records, plan.ids, parts, *drawn, start, stop, outs, pixels, scratch_of(plan.sizes)
        )
        if fault != WHOLE:
            raise damaged(self._beton, int(plan.ids[at]), fault)

    def receive(self, timeout: float) -> Views:
        plan, views, slot = self._ahead.finish(timeout)
        return self._ahead.on_device(_shaped(views, plan), slot)

    def ready(self) -> bool:
        return self._ahead.ready()

    def forget(self) -> bool:
        return self._ahead.forget()

    def close(self) -> None:
        self._ahead.close()


def _shaped(buffers: Views, plan: Plan) -> Views:
    """Return the buffers' beginnings as the plan's crops, [B, S, S, 3]."""
    shapes = [(len(plan.ids), size, size, 3) for size in plan.sizes]
    return tuple(flat[: math.prod(shape)].view(shape) for flat, shape in zip(buffers, shapes, strict=True))


build = FfcvBackend
