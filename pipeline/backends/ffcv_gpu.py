"""The FFCV backend with crops on the GPU: the CPU decodes once a sample, ragged into one pinned buffer, and no more.

One copy a batch goes to the device, on a stream of its own; there `pipeline.crop` makes the views. Without a GPU the
crops are made by compiled code on the thread that receives them.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.backends import Plan, Wanted
from pipeline.backends.ahead import Ahead
from pipeline.beton import Beton
from pipeline.crop import Ragged, crop_views
from pipeline.records import WHOLE, damaged, decode_chunk, records_of


class FfcvGpuBackend:
    """See `pipeline.backends.Backend`."""

    def __init__(self, beton: Beton, wanted: Wanted) -> None:
        self.depth = wanted.depth
        self._beton, self._records, self._sizes = beton, records_of(beton), wanted.sizes
        self._bytes = 3 * beton.heights.astype(np.int64) * beton.widths
        most = wanted.batch * int(self._bytes.max())  # also where a substitute comes several times

        def buffer(pinned: bool) -> torch.Tensor:
            return torch.empty(most, dtype=torch.uint8, pin_memory=pinned)

        self._ahead: Ahead[torch.Tensor] = Ahead(beton, wanted, self._decode, state=lambda: None, buffer=buffer)

    def _starts(self, ids: np.ndarray) -> np.ndarray:
        """Return each image's first byte in the buffer, and the end of the last: int64 [B + 1]."""
        return np.concatenate([[0], np.cumsum(self._bytes[ids])])

    def submit(self, plan: Plan) -> None:
        self._ahead.begin(plan)

    def _decode(self, state: None, plan: Plan, start: int, stop: int, pixels: torch.Tensor) -> None:
        fault, at = decode_chunk(self._records, plan.ids, self._starts(plan.ids), start, stop, pixels.numpy())
        if fault != WHOLE:
            raise damaged(self._beton, int(plan.ids[at]), fault)

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        plan, pixels, slot = self._ahead.finish(timeout)
        starts = self._starts(plan.ids)
        (pixels,) = self._ahead.on_device([pixels[: starts[-1]]], slot)
        widths = self._beton.widths[plan.ids].astype(np.int64)
        return crop_views(Ragged(pixels, starts[:-1], widths), plan, self._sizes)

    def close(self) -> None:
        self._ahead.close()


build = FfcvGpuBackend
