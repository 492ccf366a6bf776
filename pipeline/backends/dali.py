"""The DALI backend: DALI decodes, on the GPU where there is one; crops are made there, by the code of all backends.

JPEG bytes go from the beton's memory map into DALI's decoder once for each sample: nvJPEG on a GPU; on the CPU
libjpeg-turbo, whose pixels equal PIL's. `pipeline.augment.crop` reads DALI's output in place, without a copy. One
thread drives DALI, which has `workers` threads of its own and decodes the next batch meanwhile; `workers` more read and
check the records. On a GPU no thread waits for it: streams wait for each other by events. DALI accepts damaged JPEGs,
so records without a CRC32 are first decoded once on the CPU. Ids and draws come from the loader: a restart is exact.
"""

import zlib
from collections import deque
from concurrent.futures import Future
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

_RUNS = 2  # batches that DALI decodes at once


class DaliBackend(Backend):
    """A backend whose decoder is a DALI pipeline."""

    def __init__(self, beton: Beton, config: BackendConfig) -> None:
        super().__init__(beton, config)
        self._decoder, self._failed = _decoder(config), False
        self._driver = Workers(1, lambda: None)
        self._readers = Workers(config.workers or available_cores(), lambda: None)
        self._unchecked = np.full(len(beton), beton.crc32 is None) & (beton.modes != RAW)
        self._reading = deque[list[Future]]()  # records of the batches that DALI has not been given
        # records of the batches under way in DALI, which reads them until their output exists
        self._decoding = deque[list[np.ndarray]]()
        self._borrowed = deque[tuple[torch.cuda.Event, Any]]()  # its outputs that kernels may still read

    def _start(self, plan: Plan) -> UnderWay:
        self._reading.append([self._readers.submit(self._encoded, index) for index in plan.ids.tolist()])
        return UnderWay(plan, [self._driver.submit(self._views, plan)])

    def _finish(self, batch: UnderWay) -> tuple[torch.Tensor, ...]:
        views, event = batch.calls[0].result()
        if event is not None:
            stream = torch.cuda.current_stream(self._config.device)
            stream.wait_event(event)
            for view in views:  # allocated on this backend's stream
                view.record_stream(stream)
        return views

    def _views(self, state: None, plan: Plan) -> tuple[tuple[torch.Tensor, ...], torch.cuda.Event | None]:
        """Return the crops of the oldest batch; on a GPU they are complete after the event."""
        if not self._decoding:
            self._decode()
        while self._reading and len(self._decoding) < _RUNS and all(map(_succeeded, self._reading[0])):
            self._decode()
        try:
            (images,) = self._decoder.share_outputs(cuda_stream=self._stream)
        except RuntimeError as error:
            self._failed = True
            raise self._decode_error(plan, error) from None
        self._decoder.release_outputs()  # its memory stays ours as long as `images` lives
        self._decoding.popleft()
        if self._stream is None:
            return crop_views(self._in_place(images, plan), plan), None
        with torch.cuda.stream(self._stream):
            views = crop_views(self._in_place(images, plan), plan)
        event = self._stream.record_event()
        self._borrowed.append((event, images))
        while self._borrowed[0][0].query() and len(self._borrowed) > 1:
            self._borrowed.popleft()
        return views, event

    def _decode(self) -> None:
        """Have DALI decode the oldest batch that it has not been given, once its records are read."""
        encoded = [record.result() for record in self._reading.popleft()]
        self._decoder.feed_input("encoded", encoded)
        self._decoding.append(encoded)
        self._decoder.schedule_run()

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
        idle = super().forget()
        while self._reading:
            for record in self._reading.popleft():
                record.cancel()
        if not idle or self._failed:
            return False  # the decoder is busy, or cannot run again
        try:
            while self._decoding:
                self._decoder.share_outputs()
                self._decoder.release_outputs()
                self._decoding.popleft()
        except RuntimeError:  # an undecodable record in a batch that is dropped
            self._failed = True
        return not self._failed

    def close(self) -> None:
        super().close()
        self._driver.close()
        self._readers.close()


def _succeeded(call: Future) -> bool:
    return call.done() and not call.cancelled() and call.exception() is None


def _memory(address: int, size: int, device: torch.device) -> torch.Tensor:
    """Return `size` bytes of memory from `address` on as a tensor that does not own them: uint8."""
    interface = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}
    borrowed = SimpleNamespace(__array_interface__=interface, __cuda_array_interface__=interface)
    return torch.as_tensor(borrowed, device=device) if device.type == "cuda" else torch.from_numpy(np.asarray(borrowed))


def _decoder(config: BackendConfig) -> Any:
    """Return a DALI pipeline that decodes one batch, `encoded`, at each run.

    Its executor is the dynamic one, DALI's default: runs go on in the background, and their outputs stay valid.
    """
    on_gpu = config.device.type == "cuda"

    @dali.pipeline_def(
        batch_size=config.batch,
        num_threads=config.workers or available_cores(),
        device_id=cast(int, config.device.index if on_gpu else None),
        prefetch_queue_depth=1,  # runs that DALI starts before it is given a batch; `_RUNS` says how many follow
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
