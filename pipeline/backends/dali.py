"""The DALI backend: DALI decodes, on the GPU where there is one; crops are made there, by the code of all backends.

JPEG bytes go from the beton's memory map into DALI's decoder once for each sample: nvJPEG on a GPU; on the CPU
libjpeg-turbo, whose pixels equal PIL's. `pipeline.augment.crop` reads DALI's output in place, without a copy. One
thread drives DALI, which has `workers` threads of its own; `workers` more read and check the records. DALI accepts
damaged JPEGs, so records without a CRC32 are first decoded once on the CPU. Ids and draws come from the loader: a
restart is exact.
"""

import zlib
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from nvidia import dali

from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.plan import Plan
from pipeline.backends.base import Backend, BackendConfig, UnderWay
from pipeline.beton import Beton
from pipeline.beton_format import RAW
from pipeline.storage.decode import UNDECODABLE, check_record, damaged
from pipeline.system.cores import available_cores
from pipeline.system.thread_pool import Workers

fn: Any = dali.fn
types: Any = dali.types


class DaliBackend(Backend):
    """A backend whose decoder is a DALI pipeline."""

    def __init__(self, beton: Beton, config: BackendConfig) -> None:
        super().__init__(beton, config)
        self._decoder = _decoder(config)
        self._failed_input: list[np.ndarray] | None = None
        self._driver = Workers(1, lambda: None)
        self._readers = Workers(config.workers or available_cores(), lambda: None)
        self._unchecked = np.full(len(beton), beton.crc32 is None) & (beton.modes != RAW)

    def _start(self, plan: Plan) -> UnderWay:
        return UnderWay(plan, [self._driver.submit(self._views, plan)])

    def _finish(self, batch: UnderWay) -> tuple[torch.Tensor, ...]:
        views = batch.calls[0].result()
        if self._stream is not None:
            for view in views:  # made on this backend's stream; complete, as `_views` waited for it
                view.record_stream(torch.cuda.current_stream(self._config.device))
        return views

    def _views(self, state: None, plan: Plan) -> tuple[torch.Tensor, ...]:
        records = [self._readers.submit(self._encoded, index) for index in plan.ids.tolist()]
        encoded = [future.result() for future in records]
        try:
            (images,) = self._decoder.run(encoded=encoded)
        except RuntimeError as error:
            self._failed_input = encoded  # the decoder cannot run again, and may still be reading these
            raise self._decode_error(plan, error) from None
        if self._stream is None:
            return crop_views(self._in_place(images, plan), plan)
        with torch.cuda.stream(self._stream):
            views = crop_views(self._in_place(images, plan), plan)
        self._stream.synchronize()  # before DALI overwrites its output
        return views

    def _encoded(self, state: None, index: int) -> np.ndarray:
        """Return the record's bytes; a raw record as a PNM, which DALI reads too. Raises DamagedRecord."""
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

    def _in_place(self, images: Any, plan: Plan) -> Ragged:
        """Return DALI's images where they lie in memory, as offsets into one tensor that spans them all."""
        heights, widths = self._beton.heights[plan.ids], self._beton.widths[plan.ids].astype(np.int64)
        parts = [images[i] for i in range(len(plan.ids))]
        for index, part, height, width in zip(plan.ids, parts, heights, widths, strict=True):
            if tuple(part.shape()) != (height, width, 3):
                raise damaged(self._beton, int(index), UNDECODABLE)
        addresses = np.array([part.data_ptr() for part in parts], np.int64)
        first = int(addresses.min())
        span = int((addresses - first + 3 * heights.astype(np.int64) * widths).max())
        return Ragged(_memory(first, span, self._config.device), addresses - first, widths)

    def _decode_error(self, plan: Plan, error: RuntimeError) -> Exception:
        """Return the error that names the sample DALI could not decode, or DALI's error where all of them decode."""
        for index in plan.ids:
            if fault := check_record(self._beton, int(index)):
                return damaged(self._beton, int(index), fault)
        return error

    def forget(self) -> bool:
        return super().forget() and self._failed_input is None

    def close(self) -> None:
        super().close()
        self._driver.close()
        self._readers.close()


def _memory(address: int, size: int, device: torch.device) -> torch.Tensor:
    """Return `size` bytes of memory from `address` on as a tensor that does not own them: uint8."""
    interface = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
    borrowed = SimpleNamespace(__array_interface__=interface, __cuda_array_interface__=interface)
    return torch.as_tensor(borrowed, device=device) if device.type == "cuda" else torch.from_numpy(np.asarray(borrowed))


def _decoder(config: BackendConfig) -> Any:
    """Return a DALI pipeline that decodes one batch, `encoded`, at each run."""
    on_gpu = config.device.type == "cuda"

    @dali.pipeline_def(
        batch_size=config.batch,
        num_threads=config.workers or available_cores(),
        device_id=cast(int, config.device.index if on_gpu else None),
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    def decode() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=not on_gpu)
        # Fancy upsampling: colors interpolated as on the CPU and by Pillow.
        gpu_options = {"hw_decoder_load": config.hw_decoder_load, "jpeg_fancy_upsampling": True} if on_gpu else {}
        kind = "mixed" if on_gpu else "cpu"
        return fn.decoders.image(encoded, device=kind, output_type=types.RGB, adjust_orientation=False, **gpu_options)

    pipeline = decode()
    pipeline.build()
    return pipeline


build = DaliBackend
