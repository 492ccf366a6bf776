"""The resident backend: decodes all images once into one uint8 buffer on the device, and crops them there.

For sets that fit: CIFAR, STL, Tiny-ImageNet, ImageNet at reduced size. On a GPU the CPU then has no work left; on the
CPU this is the FFCV backend without the decoding.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipeline.augment.crop import Ragged, crop_views
from pipeline.augment.plan import Plan
from pipeline.backends.base import Backend, BackendConfig, UnderWay
from pipeline.backends.ffcv import FfcvBackend
from pipeline.beton import Beton
from pipeline.beton_format import RAW
from pipeline.storage.decode import INTACT, Records, damaged, decode_chunk, full_rectangles, records_of
from pipeline.system.cores import available_cores, free_memory
from pipeline.system.errors import InputError
from pipeline.system.text import binary

SHARE = 0.5
"""Share of the free memory that the images may take for `auto` to choose this backend, before a model is built."""
MOST = 0.8
"""Share of the free memory that they may take at all."""
_CHUNK_SAMPLES = 64  # samples in a call of a worker
_BLOCK_BYTES = 1 << 28  # decoded, then copied to the device


def needed(beton: Beton) -> int:
    """Return the bytes all images take."""
    return 3 * sum(int(pixels.sum()) for pixels in beton.pixels())


def free(device: torch.device) -> int:
    """Return the bytes that are free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() or 0


def fits(beton: Beton, device: torch.device) -> bool:
    """Return whether all images take at most `MOST` of the free memory."""
    return needed(beton) <= MOST * free(device)


def decode_all(beton: Beton, config: BackendConfig) -> tuple[torch.Tensor, np.ndarray]:
    """Return all images on the device, uint8, flat, and the first byte of each, int64 [N].

    For a GPU, blocks pass in turn through two pinned buffers, so that one is decoded while the other is copied. Skipped
    samples are not decoded. Raises one DamagedRecord for all damaged samples.
    """
    starts = np.concatenate([[0], np.cumsum(_bytes(beton))])
    blocks, decoder = _blocks(starts), _Decoder(beton, starts, sorted(config.skipped))
    out = torch.empty(int(starts[-1]), dtype=torch.uint8, device=config.device)
    on_gpu = config.device.type == "cuda"
    largest = max(int(starts[end] - starts[first]) for first, end in blocks)
    staging = [torch.empty(largest, dtype=torch.uint8, pin_memory=True) for _ in range(2)] if on_gpu else []
    copied: list[Any] = [None, None]
    with ThreadPoolExecutor(config.workers or available_cores()) as pool:
        for number, (first, end) in enumerate(blocks):
            block, slot = out[int(starts[first]) : int(starts[end])], number % 2
            if copied[slot] is not None:
                copied[slot].synchronize()
            target = staging[slot] if on_gpu else block
            spans = [(start, min(start + _CHUNK_SAMPLES, end)) for start in range(first, end, _CHUNK_SAMPLES)]
            for future in [pool.submit(decoder.decode, *span, target, first) for span in spans]:
                future.result()
            if on_gpu:
                block.copy_(target[: len(block)], non_blocking=True)
                copied[slot] = torch.cuda.Event()
                copied[slot].record(torch.cuda.current_stream(config.device))
    if on_gpu:
        torch.cuda.synchronize(config.device)
    if decoder.faults:
        first_bad, *others = sorted(decoder.faults)
        raise damaged(beton, first_bad, decoder.faults[first_bad], tuple(others))
    return out, starts[:-1]


class _Decoder:
    """Decodes runs of samples into memory, one after another, from several threads; collects the faults."""

    def __init__(self, beton: Beton, starts: np.ndarray, skipped: list[int]) -> None:
        self._beton, self._starts, self._skipped = beton, starts, skipped
        self.faults: dict[int, int] = {}
        """Fault of each damaged sample."""

    def decode(self, first: int, end: int, target: torch.Tensor, base: int) -> None:
        """Decode samples first..end to their places in `target`, which begins with sample `base`."""
        for stop in [*(index for index in self._skipped if first <= index < end), end]:
            while first < stop:  # up to the next skipped sample
                records, starts = records_of(self._beton, np.arange(first, stop)), self._starts[first : stop + 1]
                boxes = full_rectangles(records)
                if (3 * boxes[:, 2].astype(np.int64) * boxes[:, 3] != np.diff(starts)).any():
                    raise InputError(f"{self._beton.path}: was overwritten while it was read: start again")
                samples = records, boxes, starts - self._starts[base]
                fault, position = decode_chunk(*samples, 0, stop - first, target.numpy())
                if fault == INTACT:
                    break
                self.faults[first + int(position)] = fault
                first += int(position) + 1
            first = stop + 1


def _blocks(starts: np.ndarray) -> list[tuple[int, int]]:
    """Return first and end of runs of samples of at most `_BLOCK_BYTES`, or of one sample."""
    blocks, first = [], 0
    while first < len(starts) - 1:
        end = max(int(np.searchsorted(starts, starts[first] + _BLOCK_BYTES, "right")) - 1, first + 1)
        blocks.append((first, end))
        first = end
    return blocks


def _bytes(beton: Beton) -> np.ndarray:
    """Return the bytes of each decoded image: int64 [N]."""
    return 3 * beton.heights.astype(np.int64) * beton.widths


class ResidentBackend(Backend):
    """A backend on a GPU: every crop is one kernel, so that no batch is ever waited for."""

    def __init__(self, beton: Beton, config: BackendConfig, pixels: torch.Tensor, starts: np.ndarray) -> None:
        super().__init__(beton, config)
        self._widths, self._starts, self._pixels = beton.widths.astype(np.int64), starts, pixels

    def _start(self, plan: Plan) -> UnderWay:
        return UnderWay(plan, [])

    def _finish(self, batch: UnderWay) -> tuple[torch.Tensor, ...]:
        ids = batch.plan.ids
        return crop_views(Ragged(self._pixels, self._starts[ids], self._widths[ids]), batch.plan)

    def close(self) -> None:
        super().close()
        self._pixels = self._pixels[:0].clone()  # frees the memory


def build(beton: Beton, config: BackendConfig) -> Backend:
    """Return the backend. Raises InputError where the images take more than `MOST` of the free memory."""
    device = config.device
    if not fits(beton, device):
        raise InputError(
            f"data.backend 'resident': the images of {beton.path} take {binary(needed(beton))}, more than "
            f"{MOST:.0%} of the {binary(free(device))} free on {device.type}: choose another backend"
        )
    pixels, starts = decode_all(beton, config)
    if device.type == "cuda":
        return ResidentBackend(beton, config, pixels, starts)
    # The decoded images, as raw records that need no check.
    places = starts.astype(np.uint64), _bytes(beton).astype(np.uint64)
    sides = beton.heights.astype(np.int32), beton.widths.astype(np.int32)
    raw = Records(pixels.numpy(), *places, *sides, np.full(len(beton), RAW, np.uint8), np.zeros(0, np.uint32))
    return FfcvBackend(beton, config, raw)
