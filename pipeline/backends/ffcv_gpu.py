"""The FFCV backend with crops on the GPU: the CPU only decodes, once for each sample, into one pinned buffer.

One copy of each batch goes to the device, on a separate stream; there `pipeline.augment.crop` makes the views. Without
a GPU, compiled code makes the views on the thread that receives them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.plan import Plan
from pipeline.backends.threaded import ThreadedBackend
from pipeline.storage.decode import INTACT, Records, damaged, decode_chunk, rectangles


@dataclass(frozen=True)
class PackedPlan(Plan):
    """A plan whose images' parts are packed one after another into a buffer; its boxes are relative to the parts."""

    records: Records
    parts: np.ndarray
    """int32 [B, 4]: the part of each image to decode, as `rectangles` returns."""
    starts: np.ndarray
    """int64 [B + 1]: first byte of each part, and the end of the last."""


class GrowingBuffer:
    """Bytes for one batch, as many as the largest batch so far took.

    Batches of images of many sizes differ less in size than single images do, so that this takes far less memory than
    room for a batch of the largest image would.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned, self.bytes = pinned, torch.empty(0, dtype=torch.uint8)

    def reserve(self, size: int) -> None:
        """Make room for `size` bytes; a new buffer is a quarter larger than that."""
        if len(self.bytes) < size:
            self.bytes = torch.empty(size + size // 4, dtype=torch.uint8, pin_memory=self._pinned)


class FfcvGpuBackend(ThreadedBackend[GrowingBuffer]):
    """A backend that decodes into one buffer for each batch, and crops on the device."""

    def _new_buffer(self, pinned: bool) -> GrowingBuffer:
        return GrowingBuffer(pinned)

    def _prepare(self, plan: Plan, buffer: GrowingBuffer) -> PackedPlan:
        records, boxes = self._records_of(plan.ids), plan.boxes.copy()
        parts = rectangles(records, plan.boxes)
        boxes[:, :, :2] -= parts[:, :2]
        ends = np.cumsum(3 * parts[:, 2].astype(np.int64) * parts[:, 3])
        buffer.reserve(int(ends[-1]))
        return PackedPlan(
            plan.ids, boxes, plan.flips, plan.sizes, records, parts, np.concatenate([[0], ends]), colors=plan.colors
        )

    def _fill(self, state: None, plan: Plan, start: int, stop: int, buffer: GrowingBuffer) -> None:
        assert isinstance(plan, PackedPlan)
        span = plan.records, plan.parts, plan.starts, start, stop
        fault, position = decode_chunk(*span, buffer.bytes.numpy())
        if fault != INTACT:
            raise damaged(self._beton, int(plan.ids[position]), fault)

    def _crops(self, plan: Plan, buffer: GrowingBuffer, slot: int) -> tuple[torch.Tensor, ...]:
        assert isinstance(plan, PackedPlan)
        (pixels,) = self._to_device([buffer.bytes[: plan.starts[-1]]], slot)
        return crop_views(Ragged(pixels, plan.starts[:-1], plan.parts[:, 3].astype(np.int64)), plan)


build = FfcvGpuBackend
