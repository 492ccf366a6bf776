"""The FFCV backend with crops on the GPU: the CPU decodes once a sample, ragged into one pinned buffer, and no more.

One copy a batch goes to the device, on a stream of its own; there `pipeline.crop` makes the views. Without a GPU the
crops are made by compiled code on the thread that receives them.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from pipeline.backends import Plan
from pipeline.backends.ahead import Ahead
from pipeline.beton import Beton
from pipeline.crop import Ragged, crop_views
from pipeline.records import WHOLE, damaged, decode_record, records_of


@numba.njit(nogil=True, boundscheck=False)
def _decode_chunk(records: Any, ids: Any, starts: Any, start: int, stop: int, pixels: Any) -> tuple[int, int]:
    """Decode samples start..stop to their places in `pixels`; return the first fault and its place, or (0, 0)."""
    for i in range(start, stop):
        to = pixels[starts[i] : starts[i + 1]]
        fault, image = decode_record(records, ids[i], to)
        if fault != WHOLE:
            return fault, i
        if image.ctypes.data != to.ctypes.data:  # a raw record: not decoded, but read where it is
            to[:] = image
    return WHOLE, 0


class FfcvGpuBackend:
    """See `pipeline.backends.Backend`."""

    def __init__(
        self,
        beton: Beton,
        *,
        sizes: tuple[int, ...],
        batch: int,
        workers: int,
        depth: int,
        device: torch.device,
    ) -> None:
        self.depth = depth
        self._beton, self._records, self._device, self._sizes = beton, records_of(beton), device, sizes
        pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if pinned else None
        self._bytes = 3 * beton.heights.astype(np.int64) * beton.widths
        most = batch * int(self._bytes.max())  # also where a substitute comes several times
        self._ahead: Ahead[torch.Tensor] = Ahead(
            beton,
            self._decode,
            workers=workers,
            depth=depth,
            state=lambda: None,
            buffer=lambda: torch.empty(most, dtype=torch.uint8, pin_memory=pinned),
        )

    def _starts(self, ids: np.ndarray) -> np.ndarray:
        """Return each image's first byte in the buffer, and the end of the last: int64 [B + 1]."""
        return np.concatenate([[0], np.cumsum(self._bytes[ids])])

    def submit(self, plan: Plan) -> None:
        self._ahead.begin(plan)

    def _decode(self, state: None, plan: Plan, start: int, stop: int, pixels: torch.Tensor) -> None:
        fault, at = _decode_chunk(self._records, plan.ids, self._starts(plan.ids), start, stop, pixels.numpy())
        if fault != WHOLE:
            raise damaged(self._beton, int(plan.ids[at]), fault)

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        plan, pixels, slot = self._ahead.finish(timeout)
        starts = self._starts(plan.ids)
        pixels = pixels[: starts[-1]]
        if self._stream is not None:
            pixels = self._copy(pixels, slot)
        widths = self._beton.widths[plan.ids].astype(np.int64)
        return crop_views(Ragged(pixels, starts[:-1], widths), plan, self._sizes)

    def _copy(self, pixels: torch.Tensor, slot: int) -> torch.Tensor:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            copy = pixels.to(self._device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._ahead.copied(slot, event)
        torch.cuda.current_stream().wait_event(event)
        copy.record_stream(torch.cuda.current_stream())
        return copy

    def close(self) -> None:
        self._ahead.close()


build = FfcvGpuBackend
