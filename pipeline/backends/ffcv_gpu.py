"""The FFCV backend with crops on the GPU: the CPU decodes once a sample, ragged into one pinned buffer, and no more.

One copy a batch goes to the device, on a stream of its own; there `pipeline.augment.crop` makes the views. Without a
GPU the crops are made by compiled code on the thread that receives them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.plan import Plan
from pipeline.backends.base import Wanted
from pipeline.backends.threaded import Ahead
from pipeline.beton import Beton
from pipeline.storage.decode import WHOLE, Records, damaged, decode_chunk, records_of, rectangles


@dataclass(frozen=True)
class _LaidOut(Plan):
    """A plan, and what of each image lies where in the buffer."""

    parts: np.ndarray
    """int32 [B, 4]: of `rectangles`."""
    starts: np.ndarray
    """int64 [B + 1]: each part's first byte, and the end of the last."""

    @staticmethod
    def within(plan: Plan, records: Records) -> _LaidOut:
        """Return `plan` with its images' parts one after another."""
        parts = rectangles(records, plan.ids, plan.boxes)
        ends = np.cumsum(3 * parts[:, 2].astype(np.int64) * parts[:, 3])
        return _LaidOut(plan.ids, plan.boxes, plan.flips, plan.sizes, parts, np.concatenate([[0], ends]))

    def inside(self) -> np.ndarray:
        """Return the boxes as they lie in the parts."""
        boxes = self.boxes.copy()
        boxes[:, :, :2] -= self.parts[:, :2]
        return boxes


class _Room:
    """A buffer that grows to the largest batch met: images of many sizes differ less by batches than one by one."""

    def __init__(self, pinned: bool) -> None:
        self._pinned, self.bytes = pinned, torch.empty(0, dtype=torch.uint8)

    def grow(self, plan: _LaidOut) -> None:
        if len(self.bytes) < (needed := int(plan.starts[-1])):
            self.bytes = torch.empty(needed + needed // 4, dtype=torch.uint8, pin_memory=self._pinned)


class FfcvGpuBackend:
    """See `pipeline.backends.Backend`."""

    def __init__(self, beton: Beton, wanted: Wanted) -> None:
        self.depth = wanted.depth
        self._beton, self._records = beton, records_of(beton)
        self._ahead: Ahead[_Room] = Ahead(
            beton, wanted, self._decode, state=lambda: None, buffer=_Room, room=_Room.grow
        )

    def submit(self, plan: Plan) -> None:
        self._ahead.begin(_LaidOut.within(plan, self._records))

    def _decode(self, state: None, plan: _LaidOut, start: int, stop: int, room: _Room) -> None:
        place = plan.ids, plan.parts, plan.starts, start, stop, room.bytes.numpy()
        fault, at = decode_chunk(self._records, *place)
        if fault != WHOLE:
            raise damaged(self._beton, int(plan.ids[at]), fault)

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        plan, room, slot = self._ahead.finish(timeout)
        assert isinstance(plan, _LaidOut)
        (pixels,) = self._ahead.on_device([room.bytes[: plan.starts[-1]]], slot)
        images = Ragged(pixels, plan.starts[:-1], plan.parts[:, 3].astype(np.int64))
        return crop_views(images, replace(plan, boxes=plan.inside()))

    def ready(self) -> bool:
        return self._ahead.ready()

    def forget(self) -> bool:
        return self._ahead.forget()

    def close(self) -> None:
        self._ahead.close()


build = FfcvGpuBackend
