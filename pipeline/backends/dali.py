"""The DALI backend: records decoded by DALI, on the GPU where there is one, and cropped where they then lie.

JPEG bytes go straight from the beton's memory map into DALI's decoder (nvJPEG on a GPU, libjpeg-turbo, with PIL's very
pixels, on the CPU), once a sample. Its output is not copied: `pipeline.augment.crop` reads it in place, so that crops
are the same as every other backend's. One thread of ours drives DALI, which has `workers` of its own; as many read and
check the records. DALI takes damaged JPEGs for whole, so that those that no CRC32 stands for are decoded once on the
CPU, the first time they are met. Ids and draws being ours, a restart is exact.
"""

from __future__ import annotations

import zlib
from collections import deque
from concurrent.futures import Future, wait
from typing import Any, cast

import numpy as np
import torch
from nvidia import dali

from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.plan import Plan
from pipeline.backends.base import Wanted
from pipeline.backends.threaded import abandon, stalled
from pipeline.beton import Beton
from pipeline.native.libffcv import RAW
from pipeline.storage.decode import check_record, damaged
from pipeline.system.cores import available_cores
from pipeline.system.thread_pool import Workers

fn: Any = dali.fn
types: Any = dali.types


class DaliBackend:
    """See `pipeline.backends.Backend`."""

    def __init__(self, beton: Beton, wanted: Wanted) -> None:
        self.depth = wanted.depth
        self._beton, self._device = beton, wanted.device
        self._stream = torch.cuda.Stream(wanted.device) if wanted.device.type == "cuda" else None
        self._decoder = _decoder(wanted)
        self._pending: deque[tuple[Plan, Future]] = deque()
        self._failed, self._kept = False, list[np.ndarray]()
        self._workers = Workers(1, lambda: None)
        self._readers = Workers(wanted.workers or available_cores(), lambda: None)
        self._unchecked = np.full(len(beton), beton.crc32 is None) & (beton.modes != RAW)

    def submit(self, plan: Plan) -> None:
        self._pending.append((plan, self._workers.submit(self._views, plan)))

    def receive(self, timeout: float) -> tuple[torch.Tensor, ...]:
        plan, future = self._pending[0]
        if wait([future], timeout).not_done:
            raise stalled(self._beton, plan, timeout)
        views = future.result()
        self._pending.popleft()
        if self._stream is not None:
            for view in views:  # made on a stream of ours, and whole: `_views` waited
                view.record_stream(torch.cuda.current_stream(self._device))
        return views

    def _views(self, state: None, plan: Plan) -> tuple[torch.Tensor, ...]:
        reading = [self._readers.submit(self._encoded, index) for index in plan.ids.tolist()]
        encoded = [future.result() for future in reading]
        try:
            (images,) = self._decoder.run(encoded=encoded)
        except RuntimeError as error:
            self._failed, self._kept = True, encoded  # it runs no more, and may still be reading
            raise self._explained(plan, error) from None
        if self._stream is None:
            return crop_views(self._lying(images, plan), plan)
        with torch.cuda.stream(self._stream):
            views = crop_views(self._lying(images, plan), plan)
        self._stream.synchronize()  # DALI's buffers are free again
        return views

    def _encoded(self, state: None, index: int) -> np.ndarray:
        """Return the record's bytes; of a raw one as a PNM, which DALI reads too. Raises DamagedRecord."""
        beton = self._beton
        data = np.asarray(beton.record(index))
        if beton.crc32 is not None and zlib.crc32(data.data) != beton.crc32[index]:
            raise damaged(beton, index, check_record(beton, index) or "its bytes changed while they were read")
        if self._unchecked[index]:
            if fault := check_record(beton, index):
                raise damaged(beton, index, fault)
            self._unchecked[index] = False
        if beton.modes[index] != RAW:
            return data
        header = f"P6 {beton.widths[index]} {beton.heights[index]} 255\n".encode()
        return np.concatenate([np.frombuffer(header, np.uint8), data])

    def _lying(self, images: Any, plan: Plan) -> Ragged:
        """Return where DALI's images lie: distances from the first in memory, in a tensor that spans them all."""
        beton = self._beton
        parts = [images[i] for i in range(len(plan.ids))]
        for index, part in zip(plan.ids, parts, strict=True):
            if tuple(part.shape()) != (beton.heights[index], beton.widths[index], 3):
                raise damaged(
                    self._beton, int(index), "its JPEG does not decode, or not to the stored height and width"
                )
        places = np.array([part.data_ptr() for part in parts], np.int64)
        first = int(places.min())
        widths = beton.widths[plan.ids].astype(np.int64)
        bytes_ = 3 * beton.heights[plan.ids].astype(np.int64) * widths
        span = int((places - first + bytes_).max())
        return Ragged(_memory(first, span, self._device), places - first, widths)

    def _explained(self, plan: Plan, error: RuntimeError) -> Exception:
        """Return the error that names the sample DALI could not decode, or DALI's own where all of them decode."""
        for index in plan.ids:
            if fault := check_record(self._beton, int(index)):
                return damaged(self._beton, int(index), fault)
        return error

    def ready(self) -> bool:
        return bool(self._pending) and self._pending[0][1].done()

    def forget(self) -> bool:
        futures = [future for _, future in self._pending]
        self._pending.clear()
        return abandon(futures) and not self._failed

    def close(self) -> None:
        self._pending.clear()
        self._workers.close()
        self._readers.close()


def _memory(address: int, span: int, device: torch.device) -> torch.Tensor:
    """Return `span` bytes of memory from `address` on as a tensor, without owning them: uint8."""
    lent = _Lent({"data": (address, False), "shape": (span,), "typestr": "|u1", "version": 3})
    return torch.as_tensor(lent, device=device) if device.type == "cuda" else torch.from_numpy(np.asarray(lent))


class _Lent:
    """Memory as NumPy and torch take it."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = self.__cuda_array_interface__ = interface


def _decoder(wanted: Wanted) -> Any:
    """Return a DALI pipeline from `encoded` to images, which is run a batch at a time."""
    on_gpu = wanted.device.type == "cuda"

    @dali.pipeline_def(
        batch_size=wanted.batch,
        num_threads=wanted.workers or available_cores(),
        device_id=cast(int, wanted.device.index if on_gpu else None),
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def decode() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=not on_gpu)
        # as the CPU interpolates colors, and Pillow
        more = {"hw_decoder_load": wanted.hardware_load, "jpeg_fancy_upsampling": True} if on_gpu else {}
        kind = "mixed" if on_gpu else "cpu"
        return fn.decoders.image(encoded, device=kind, output_type=types.RGB, adjust_orientation=False, **more)

    made = decode()
    made.build()
    return made


build = DaliBackend
